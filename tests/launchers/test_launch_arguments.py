"""Wrong arguments: one error, at once, that says what was got and what was expected."""

from __future__ import annotations

import functools
import re
from datetime import timedelta
from typing import Any

import pytest

import idist
from idist import environments, launchers
from idist.backends.c10d import C10d
from idist.environments import Detection
from idist.topology import Topology


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "launch", lambda *args: pytest.fail("it went as far as starting processes"))


def plan(**arguments: Any) -> launchers.Job:
    return launchers.plan("gloo", {}, **{"nproc_per_node": 2, **arguments})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"nproc_per_node": 0}, "nproc_per_node must be an integer of at least 1, got 0"),
        ({"nproc_per_node": -1}, "got -1"),
        ({"nproc_per_node": "2"}, "got '2'"),
        ({"nproc_per_node": 2.0}, "got 2.0"),
        ({"nproc_per_node": True}, "got True"),
        ({"nnodes": 0}, "nnodes must be an integer of at least 1, got 0"),
        ({"nnodes": 2}, "nnodes=2 needs node_rank, the index of this node: 0 to 1"),
        ({"nnodes": 2, "node_rank": 2}, "node_rank must be 0 to 1 with nnodes=2, got 2"),
        ({"nnodes": 2, "node_rank": -1}, "node_rank must be an integer of at least 0, got -1"),
        ({"node_rank": 1}, "node_rank=1 was given without nnodes"),
        ({"nnodes": 2, "node_rank": 0}, "nnodes=2 needs master_addr and master_port"),
        ({"nnodes": 2, "node_rank": 0, "master_addr": "a"}, "got master_addr='a', master_port=None"),
        ({"nnodes": 2, "node_rank": 0, "init_method": "env://"}, "got master_addr=None, master_port=None"),
        ({"master_addr": "a"}, "master_addr='a' needs a master_port too"),
        ({"master_addr": "", "master_port": 1}, "master_addr must be a host name or an address, got ''"),
        ({"master_port": 70000}, "master_port must be 1 to 65535, got 70000"),
        ({"master_port": "x"}, "master_port must be an integer of at least 1, got 'x'"),
        ({"init_method": "tcp://host"}, "init_method 'tcp://host' cannot be used; expected tcp://host:port"),
        ({"init_method": "tcp://host:port"}, "cannot be used"),
        ({"init_method": "file://"}, "cannot be used"),
        ({"init_method": "udp://host:1"}, "cannot be used"),
        ({"init_method": 3}, "init_method must be a string, got 3"),
        ({"init_method": "tcp://h:1", "master_addr": "a"}, "already says where the ranks meet"),
        ({"start_method": "thread"}, "start_method 'thread' is unknown; expected one of forkserver, spawn, fork"),
        ({"join": False}, "join=False is not supported"),
        ({"timeout": 0}, "timeout must be more than 0 seconds, got 0"),
        ({"timeout": "1"}, "timeout must be a number of seconds or a timedelta, got '1'"),
        ({"device": "gpu"}, "device 'gpu' is not a torch device"),
        ({"timeuot": 1}, "unknown argument 'timeuot'.* Did you mean 'timeout'"),
        ({"env": {}}, "unknown argument 'env'"),
        ({"backend": "glo"}, "backend 'glo' is unknown.* Did you mean 'gloo'"),
        ({"backend": 3}, "backend must be a string or None, got 3"),
        ({"backend": None}, "backend=None means not distributed, but nproc_per_node=2 was given"),
    ],
)
def test_wrong_argument(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(idist.ConfigError, match=says):
        idist.Parallel(**{"backend": "gloo", "nproc_per_node": 2, **arguments})
    options = {"backend": "gloo", "nproc_per_node": 2, **arguments}
    with pytest.raises(idist.ConfigError, match=says):
        idist.spawn(fn=print, **options)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"nnodes": 2}, "nnodes without nproc_per_node"),
        ({"master_addr": "a", "master_port": 1}, "master_addr, master_port without nproc_per_node"),
        ({"backend": "glo"}, "backend 'glo' is unknown"),
        ({"nprocs_per_node": 2}, "unknown argument 'nprocs_per_node'.* Did you mean 'nproc_per_node'"),
        ({"timeuot": 1}, "unknown argument 'timeuot'.* Did you mean 'timeout'"),
        ({"backend": None, "init_method": "file:///x"}, "backend=None means not distributed, but init_method"),
    ],
)
def test_wrong_argument_without_processes(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(idist.ConfigError, match=says):
        idist.Parallel(**{"backend": "gloo", **arguments})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"nnodes": 2}, "nnodes=2 cannot be used with backend 'gloo', whose processes mpiexec starts and places"),
        ({"nnodes": 1, "node_rank": 1}, "node_rank=1 cannot be used"),
        ({"master_addr": "a"}, "master_addr='a' cannot be used"),
        ({"master_port": 1}, "master_port=1 cannot be used"),
        ({"init_method": "env://"}, "init_method='env://' cannot be used"),
        ({"start_method": "fork"}, "start_method='fork' cannot be used.*start the script with mpiexec"),
    ],
)
def test_what_mpiexec_decides(monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], says: str) -> None:
    monkeypatch.setattr(C10d, "launcher", "mpiexec")
    with pytest.raises(idist.ConfigError, match=says):
        idist.Parallel("gloo", nproc_per_node=2, **arguments)
    assert plan(nnodes=1, node_rank=0).serves_here


def test_a_backend_that_cannot_be_used_here() -> None:
    unusable = sorted({"nccl", "mpi", "ucc"} - set(idist.available_backends()))[0]
    with pytest.raises(idist.BackendUnavailable, match=unusable):
        idist.Parallel(unusable, nproc_per_node=2)


@pytest.mark.parametrize("fn", [None, 3, "train"])
def test_not_a_function(fn: Any) -> None:
    with pytest.raises(idist.ConfigError, match=f"run expects a function, .*got {fn!r}"):
        idist.spawn("gloo", fn)
    for parallel in (idist.Parallel(), idist.Parallel("gloo", nproc_per_node=1)):
        with parallel, pytest.raises(idist.ConfigError, match="run expects a function"):
            parallel.run(fn)


def without_a_rank(epochs: int) -> int:
    return epochs


@pytest.mark.parametrize(
    ("args", "kwargs", "says"),
    [
        ((50,), {}, r"called as without_a_rank\(local_rank, 50\): too many positional arguments"),
        ((), {"epoch": 50}, r"called as without_a_rank\(local_rank, epoch=50\): got an unexpected keyword"),
        (({},), {}, r"called as without_a_rank\(local_rank, dict\): .* Its first argument is the local rank"),
    ],
)
def test_a_function_that_takes_something_else(args: tuple[Any, ...], kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(idist.ConfigError, match=says):
        idist.spawn("gloo", without_a_rank, args, kwargs)
    with idist.Parallel() as parallel:
        with pytest.raises(idist.ConfigError, match=says):
            parallel.run(without_a_rank, *args, **kwargs)
        assert parallel.run(without_a_rank) == [0]


def test_a_decorator_may_give_more() -> None:
    @functools.wraps(without_a_rank)
    def wrapper(local_rank: int, *args: int) -> int:
        return without_a_rank(*args)

    with idist.Parallel() as parallel:
        assert parallel.run(wrapper, 50) == [50]


def test_wrong_containers_of_arguments() -> None:
    with pytest.raises(idist.ConfigError, match="args must be a tuple of the arguments after local_rank, got 3"):
        idist.spawn("gloo", print, 3)  # type: ignore[arg-type]
    with pytest.raises(idist.ConfigError, match="kwargs_dict must be a mapping, got 3"):
        idist.spawn("gloo", print, (), 3)  # type: ignore[arg-type]


def test_places() -> None:
    job = plan(nproc_per_node=3, nnodes=2, node_rank=1, master_addr="node0", master_port=1234)
    assert not job.serves_here
    assert [(t.rank, t.world_size, t.local_rank, t.nproc_per_node, t.node_rank, t.nnodes) for t in places(job)] == [
        (3 + local, 6, local, 3, 1, 2) for local in range(3)
    ]
    assert {(t.master_addr, t.master_port, t.store_served) for t in places(job)} == {("node0", 1234, False)}


def places(job: launchers.Job) -> list[Topology]:
    return [job.topology(rank) for rank in job.ranks]


def test_where_the_ranks_meet() -> None:
    assert plan().serves_here
    tcp = plan(init_method="tcp://node0:1234")
    assert (tcp.master_addr, tcp.master_port, dict(tcp.options)) == ("node0", 1234, {})
    file = plan(init_method="file:///shared/path")
    assert (file.master_addr, file.serves_here, file.options["init_method"]) == (None, False, "file:///shared/path")
    env = launchers.plan(
        "gloo", {"MASTER_ADDR": "node0", "MASTER_PORT": "1234"}, nproc_per_node=1, init_method="env://"
    )
    assert (env.master_addr, env.master_port) == ("node0", 1234)
    local = plan(master_port=1234)
    assert (local.master_addr, local.master_port) == ("127.0.0.1", 1234)


def test_options_of_the_backend() -> None:
    job = plan(timeout=90, verify=True, pg_options=None)
    assert dict(job.options) == {"timeout": timedelta(seconds=90), "verify": True}


def launched(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    topology = Topology("torchelastic", 0, world_size, 0, world_size, 0, 1, evidence=("TORCHELASTIC_RUN_ID=1",))
    monkeypatch.setattr(environments, "detect", lambda env: Detection(topology, ()))


def test_a_launchers_process_starts_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """KNOWN-FAILURES 18."""
    launched(monkeypatch, world_size=3)
    says = "nproc_per_node=2 asks for .* torchelastic has started 3 already (TORCHELASTIC_RUN_ID=1): .* 3 x 2"
    with pytest.raises(idist.ConfigError, match=re.escape(says).replace(r"\.\*", ".*")):
        idist.Parallel("gloo", nproc_per_node=2)
    with pytest.raises(idist.ConfigError, match="Leave nproc_per_node out"):
        idist.spawn("gloo", print, nproc_per_node=2)


def test_the_only_process_of_a_launcher_may(monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, world_size=1)
    assert plan().nproc_per_node == 2


def test_several_processes_that_do_not_talk(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would train as many models, quietly."""
    launched(monkeypatch, world_size=3)
    with pytest.raises(idist.ConfigError, match="backend=None means not distributed, but torchelastic started 3"):
        idist.Parallel().__enter__()
