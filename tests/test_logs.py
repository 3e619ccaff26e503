"""Which rank says what."""

from __future__ import annotations

import io
import logging

import pytest

import idist
from idist.testing import run_threads


@pytest.mark.parametrize("all_ranks", [False, True])
def test_which_ranks_log_what(caplog: pytest.LogCaptureFixture, all_ranks: bool) -> None:
    caplog.set_level(logging.INFO)
    log = idist.get_logger("training", all_ranks=all_ranks)  # before there are ranks

    def speak() -> None:
        log.debug("nobody hears %s", "this")
        log.info("epoch %d", 3)
        log.warning("slow")
        idist.barrier()
        if idist.get_rank() == 1:
            log.error("broken: %s", {"a": 1})

    run_threads(speak, 2)
    rank_0 = ["[rank 0 of 2] epoch 3", "[rank 0 of 2] slow"]
    rank_1 = ["[rank 1 of 2] epoch 3", "[rank 1 of 2] slow"] if all_ranks else []
    assert sorted(caplog.messages) == sorted([*rank_0, *rank_1, "[rank 1 of 2] broken: {'a': 1}"])
    assert {record.name for record in caplog.records} == {"training"}


def test_the_level_is_that_of_logging(caplog: pytest.LogCaptureFixture) -> None:
    log = idist.get_logger("quiet")
    logging.getLogger("quiet").setLevel(logging.WARNING)
    try:
        log.info("not this")
        log.warning("this")
        assert caplog.messages == ["[rank 0 of 1] this"]
    finally:
        logging.getLogger("quiet").setLevel(logging.NOTSET)


def test_where_it_was_said(caplog: pytest.LogCaptureFixture) -> None:
    idist.get_logger("training").warning("here")
    assert caplog.records[0].filename == "test_logs.py"


def test_print_once() -> None:
    file = io.StringIO()
    run_threads(lambda: idist.print_once("one", 2, sep="-", file=file), 3)
    assert file.getvalue() == "one-2\n"
