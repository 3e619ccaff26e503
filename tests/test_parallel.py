"""idist.Parallel: the with block, attached and starting processes."""

from __future__ import annotations

import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import idist
from idist import runtime

TIMEOUT_S = 30.0
SCRIPT = """
import os, sys
import idist

def train(local_rank, factor, *, offset=0):
    total = idist.all_reduce(idist.get_rank() + 1)
    return idist.get_rank(), idist.get_world_size(), local_rank, idist.get_nnodes(), total * factor + offset

if __name__ == "__main__":
    arguments = eval(sys.argv[1])
    with idist.Parallel(timeout=60, **arguments) as parallel:
        sys.stdout.write(f"{parallel.run(train, 10, offset=1)}\\n")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def start(*command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def train(local_rank: int, factor: int = 1) -> tuple[int, ...]:
    return local_rank, idist.get_rank(), idist.get_world_size(), idist.all_reduce(1) * factor


def fails(local_rank: int) -> None:
    raise ValueError("boom")


# One process


@pytest.mark.parametrize("backend", [None, "gloo", "auto"])
def test_one_process(backend: str | None) -> None:
    with idist.Parallel(backend) as parallel:
        assert parallel.run(train, factor=3) == [(0, 0, 1, 3)]
        assert (idist.backend() is None) == (backend is None)
    assert idist.backend() is None


def test_run_as_often_as_you_like() -> None:
    with idist.Parallel("gloo", nproc_per_node=2, timeout=TIMEOUT_S) as parallel:
        for _ in range(3):
            assert parallel.run(train, 5) == [(0, 0, 2, 10), (1, 1, 2, 10)]
    assert idist.backend() is None


@pytest.mark.parametrize("nproc_per_node", [None, 1])
def test_entered_again(nproc_per_node: int | None) -> None:
    parallel = idist.Parallel("gloo", nproc_per_node=nproc_per_node)
    for _ in range(2):
        with parallel:
            assert parallel.run(train) == [(0, 0, 1, 1)]


@pytest.mark.parametrize("nproc_per_node", [None, 1])
def test_outside_of_the_block(nproc_per_node: int | None) -> None:
    parallel = idist.Parallel("gloo", nproc_per_node=nproc_per_node)
    with pytest.raises(idist.ConfigError, match="run works inside the with block"):
        parallel.run(train)
    with parallel, pytest.raises(idist.ConfigError, match="in use already"):
        parallel.__enter__()
    with pytest.raises(idist.ConfigError, match="run works inside the with block"):
        parallel.run(train)


def test_a_function_that_raises_ends_what_was_begun() -> None:
    parallel = idist.Parallel("gloo")
    with pytest.raises(ValueError, match="boom"), parallel:
        parallel.run(fails)
    assert idist.backend() is None
    with parallel:
        assert parallel.run(train) == [(0, 0, 1, 1)]


def test_an_end_that_fails_hides_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def finalize() -> None:
        original()
        raise RuntimeError("the connection is gone")

    original = runtime.finalize
    monkeypatch.setattr(runtime, "finalize", finalize)
    with pytest.raises(ValueError, match="boom"), idist.Parallel("gloo") as parallel:
        parallel.run(fails)
    with pytest.raises(RuntimeError, match="the connection is gone"), idist.Parallel("gloo"):
        pass


# What exists already


@pytest.mark.parametrize("backend", [None, "gloo", "auto"])
def test_a_group_of_the_user_is_used_and_stays(backend: str | None) -> None:
    """KNOWN-FAILURES 22."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=TIMEOUT_S))
    try:
        with idist.Parallel(backend) as parallel:
            assert parallel.run(train) == [(0, 0, 1, 1)]
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_another_context_than_asked_for() -> None:
    idist.initialize("gloo")
    try:
        with pytest.raises(idist.ConfigError, match="a gloo context exists already"):
            idist.Parallel("cpu:gloo,cuda:gloo").__enter__()
        with idist.Parallel("gloo") as parallel:
            assert parallel.run(train) == [(0, 0, 1, 1)]
        assert idist.backend() == "gloo"
    finally:
        idist.finalize()


def nested(local_rank: int) -> tuple[str, list[tuple[int, ...]]]:
    try:
        idist.Parallel("gloo", nproc_per_node=2)
    except idist.ConfigError as error:
        message = str(error)
    with idist.Parallel("gloo") as parallel:
        return message, parallel.run(train)


def test_inside_a_worker() -> None:
    """KNOWN-FAILURES 18: it starts no more of them; it may attach."""
    with idist.Parallel("gloo", nproc_per_node=2, timeout=TIMEOUT_S) as parallel:
        for rank, (message, results) in enumerate(parallel.run(nested)):
            assert "this process is itself one that idist.Parallel or idist.spawn has started" in message
            assert results == [(rank, rank, 2, 2)]


# Real launchers, several nodes


def test_torchrun(script: Path) -> None:
    """The script is the same as for one process."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    code, out, err = finish(start(*torchrun, script, {"backend": "gloo"}))
    assert code == 0, err
    assert sorted(out.splitlines()) == ["[(0, 2, 0, 1, 31)]", "[(1, 2, 1, 1, 31)]"]


def test_torchrun_and_processes_of_our_own(script: Path) -> None:
    """KNOWN-FAILURES 18."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    code, out, err = finish(start(*torchrun, script, {"backend": "gloo", "nproc_per_node": 2}))
    assert code != 0
    assert out == ""
    assert err.count("ConfigError: nproc_per_node=2 asks for processes to be started here") >= 1


def meet_at(how: str, tmp_path: Path) -> dict[str, Any]:
    where: dict[str, dict[str, Any]] = {
        "address": {"master_addr": "127.0.0.1", "master_port": free_port()},
        "tcp": {"init_method": f"tcp://127.0.0.1:{free_port()}"},
        "file": {"init_method": f"file://{tmp_path}/meeting"},
    }
    return where[how]


@pytest.mark.parametrize("how", ["address", "tcp", "file"])
def test_two_nodes(script: Path, tmp_path: Path, how: str) -> None:
    where = meet_at(how, tmp_path)
    nodes = [
        start(script, {"backend": "gloo", "nproc_per_node": 2, "nnodes": 2, "node_rank": node, **where})
        for node in range(2)
    ]
    for node, (code, out, err) in enumerate(map(finish, nodes)):
        assert code == 0, err
        assert out == f"{[(2 * node + local, 4, local, 2, 101) for local in range(2)]}\n"


@pytest.mark.parametrize("how", ["address", "tcp", "file"])
def test_one_node_at_a_place_of_the_users(tmp_path: Path, how: str) -> None:
    with idist.Parallel("gloo", nproc_per_node=2, timeout=TIMEOUT_S, **meet_at(how, tmp_path)) as parallel:
        assert parallel.run(train) == [(0, 0, 2, 2), (1, 1, 2, 2)]


def test_variables_of_the_environment_name_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with idist.Parallel("gloo", nproc_per_node=2, timeout=TIMEOUT_S, init_method="env://") as parallel:
        assert parallel.run(train) == [(0, 0, 2, 2), (1, 1, 2, 2)]


def trains(local_rank: int) -> list[float]:
    torch.manual_seed(0)
    model = idist.auto_model(torch.nn.Linear(4, 1))
    optimizer = idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.1))
    model(torch.full((2, 4), float(idist.get_rank() + 1))).sum().backward()
    optimizer.step()
    return [value for parameter in model.parameters() for value in parameter.detach().flatten().tolist()]


def test_ranks_train_one_model() -> None:
    with idist.Parallel("gloo", nproc_per_node=2, timeout=TIMEOUT_S) as parallel:
        first, second = parallel.run(trains)
    assert first == second
