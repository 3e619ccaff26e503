"""show_config: the context in the log."""

import logging

import pytest

import idist
from idist import runtime
from idist.backends.c10d import C10d
from idist.runtime import Context
from idist.topology import Topology


def shown(caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "idist"):
        idist.show_config()
    return dict(record.getMessage().split(": ", 1) for record in caplog.records)  # type: ignore[misc]


def test_alone(caplog: pytest.LogCaptureFixture) -> None:
    assert shown(caplog) == {
        "distributed configuration": "serial",
        "backend": "None",
        "device": str(idist.device()),
        "hostname": idist.hostname(),
        "environment": "serial",
        "world size": "1",
        "rank": "0",
        "local rank": "0",
        "num processes per node": "1",
        "num nodes": "1",
        "node rank": "0",
    }


def test_where_the_nodes_are_not_known_it_leaves_them_out(caplog: pytest.LogCaptureFixture) -> None:
    with runtime.thread_context(Context(C10d("gloo"), Topology("by hand", 1, 2), owned=False)):
        said = shown(caplog)
    assert (said["backend"], said["world size"], said["rank"]) == ("gloo", "2", "1")
    assert not {"local rank", "num nodes", "node rank"} & set(said)
