"""A run of spawned processes that goes well: what they get, how they meet, what comes back."""

from __future__ import annotations

import atexit
import contextlib
import ipaddress
import multiprocessing
import os
import random
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import DataLoader

import idist
from idist.launchers import spawn as launcher

TIMEOUT_S = 30.0


def run(fn: Callable[..., Any], *args: Any, nproc_per_node: int = 2, **options: Any) -> list[Any]:
    options.setdefault("timeout", TIMEOUT_S)
    return idist.spawn("gloo", fn, args, nproc_per_node=nproc_per_node, **options)


def place(local_rank: int) -> tuple[int, ...]:
    assert idist.get_local_rank() == local_rank
    return (
        *(idist.get_rank(), idist.get_world_size(), local_rank),
        *(idist.get_nproc_per_node(), idist.get_node_rank(), idist.get_nnodes(), idist.all_reduce(1)),
    )


def test_every_rank_has_its_place() -> None:
    assert run(place, nproc_per_node=3) == [(rank, 3, rank, 3, 0, 1, 3) for rank in range(3)]


def test_one_process() -> None:
    assert run(place, nproc_per_node=1) == [(0, 1, 0, 1, 0, 1, 1)]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_start_method(method: str) -> None:
    assert run(place, start_method=method) == [(rank, 2, rank, 2, 0, 1, 2) for rank in range(2)]


def give_back(local_rank: int, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return local_rank, args, kwargs


def test_arguments_and_results() -> None:
    results = idist.spawn("gloo", give_back, (1, "é"), {"key": None}, nproc_per_node=2, timeout=TIMEOUT_S)
    assert results == [(rank, (1, "é"), {"key": None}) for rank in range(2)]


def large(local_rank: int, data: bytes) -> bytes:
    return data + bytes([local_rank])


def test_large_arguments_and_results() -> None:
    """More than a pipe holds, both ways, from all ranks at once."""
    data = os.urandom(100_000_000)
    for rank, result in enumerate(run(large, data)):
        assert result[:-1] == data
        assert result[-1] == rank


def makes_tensors(local_rank: int) -> torch.Tensor:
    return torch.full((1000, 1000), float(local_rank))


def test_results_need_no_shared_memory() -> None:
    before = set(os.listdir("/dev/shm"))
    first, second = run(makes_tensors)
    assert (first == 0).all()
    assert (second == 1).all()
    assert not first.is_shared()
    assert set(os.listdir("/dev/shm")) <= before


# Tensors among the arguments


def add_one(local_rank: int, tensor: torch.Tensor) -> None:
    tensor += 1


def test_tensors_travel_by_value() -> None:
    tensor = torch.zeros(3)
    run(add_one, tensor)
    assert tensor.tolist() == [0, 0, 0]
    assert not tensor.is_shared()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_tensor_in_shared_memory_stays_shared(method: str) -> None:
    tensor = torch.zeros(3).share_memory_()
    run(add_one, tensor, nproc_per_node=1, start_method=method)
    assert tensor.tolist() == [1, 1, 1]


def step(local_rank: int, model: torch.nn.Module) -> float:
    idist.barrier()
    for parameter in model.parameters():
        parameter.data += 1
    idist.barrier()
    return next(model.parameters()).item()


def test_a_model_is_every_ranks_own() -> None:
    """It has more tensors than a fork server can pass descriptors, and no rank sees the steps of another."""
    model = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(150)))
    before = next(model.parameters()).item()
    assert run(step, model) == [pytest.approx(before + 1)] * 2


def uses_queue(local_rank: int, queue: Any, lock: Any) -> None:
    with lock:
        queue.put(local_rank)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_queues_and_locks(method: str) -> None:
    context = multiprocessing.get_context(method)
    queue, lock = context.Queue(), context.Lock()
    run(uses_queue, queue, lock, start_method=method)
    assert {queue.get(timeout=5), queue.get(timeout=5)} == {0, 1}
    queue.close()
    queue.join_thread()


# The environment


def environment(local_rank: int) -> dict[str, str]:
    return dict(os.environ)


def test_variables_of_a_launcher() -> None:
    """As other libraries read them."""
    for rank, env in enumerate(run(environment)):
        assert env["RANK"] == env["LOCAL_RANK"] == str(rank)
        assert env["WORLD_SIZE"] == env["LOCAL_WORLD_SIZE"] == "2"
        assert env["MASTER_ADDR"] == "127.0.0.1"
        assert 0 < int(env["MASTER_PORT"]) < 2**16


def test_our_environment_is_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """KNOWN-FAILURES 22: not even for a moment."""

    def refuse(*args: object) -> None:
        raise AssertionError(f"os.environ was written: {args}")

    before = dict(os.environ)
    with monkeypatch.context() as patch:
        patch.setattr(os, "putenv", refuse)
        patch.setattr(os, "unsetenv", refuse)
        run(environment)
    assert dict(os.environ) == before


def test_workers_see_what_was_set_since_the_fork_server_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDIST_TEST_OLD", "old")
    run(environment, nproc_per_node=1)
    monkeypatch.delenv("IDIST_TEST_OLD")
    monkeypatch.setenv("IDIST_TEST_NEW", "new")
    (env,) = run(environment, nproc_per_node=1)
    assert "IDIST_TEST_OLD" not in env
    assert env["IDIST_TEST_NEW"] == "new"


def test_what_the_user_set_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = next(name for _, name in socket.if_nameindex())
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    env, _ = run(environment)
    assert env["GLOO_SOCKET_IFNAME"] == interface
    assert env["OMP_NUM_THREADS"] == "3"


def threads(local_rank: int) -> int:
    return torch.get_num_threads()


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert run(threads, nproc_per_node=1) == [cores]
    assert run(threads, nproc_per_node=2) == [max(1, cores // 2)] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")
    assert run(threads, nproc_per_node=1) == [2]


def prints(local_rank: int) -> None:
    print("said by the worker")
    print("said by the worker too", file=sys.stderr)


def test_output_goes_where_ours_goes_now(capfd: pytest.CaptureFixture[str]) -> None:
    """The fork server was started when it went elsewhere."""
    run(prints, nproc_per_node=1)
    out, err = capfd.readouterr()
    assert out == "said by the worker\n"
    assert err == "said by the worker too\n"


def loads(local_rank: int) -> list[int]:
    dataset = [local_rank, 10]
    # A lambda cannot be pickled: the loader's processes are forked, as under any other launcher.
    loader = DataLoader(dataset, num_workers=1, collate_fn=lambda batch: batch[0] + 1)  # type: ignore[arg-type,var-annotated]
    return list(loader)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python does not fork by default there")
def test_data_loader_in_a_worker() -> None:
    assert run(loads) == [[1, 11], [2, 11]]


def registers(local_rank: int, path: Path) -> None:
    atexit.register(path.write_text, "at the end")


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_what_is_registered_for_the_exit_is_done(tmp_path: Path, method: str) -> None:
    """Experiment trackers end their run there; under any other launcher it is done as well."""
    run(registers, tmp_path / "said", nproc_per_node=1, start_method=method)
    assert (tmp_path / "said").read_text() == "at the end"


def draws(local_rank: int) -> tuple[float, float, float]:
    return random.random(), float(numpy.random.random()), torch.rand(1).item()


def test_random_numbers_are_those_of_fresh_processes() -> None:
    """A copy of the fork server's generators would draw the same on all ranks, in all runs."""
    drawn = [*run(draws), *run(draws)]
    assert len({python for python, _, _ in drawn}) == 4
    assert len({array for _, array, _ in drawn}) == 4
    assert len({tensor for _, _, tensor in drawn}) == 1  # torch's have a fixed seed in every new process


# Nothing is open to the outside, nothing stays


def listening(local_rank: int, parent: int) -> list[str]:
    """The addresses at which this process and the one that started it listen."""
    idist.barrier()
    inodes = set()
    for pid in (os.getpid(), parent):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
    found = [address for table in ("tcp", "tcp6") for address, inode in _listeners(table) if inode in inodes]
    idist.barrier()
    return found


def _listeners(table: str) -> Iterator[tuple[str, str]]:
    for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A":
            words = bytes.fromhex(fields[1].partition(":")[0])
            swapped = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
            yield str(ipaddress.ip_address(swapped)), fields[9]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_the_loopback_interface_listens() -> None:
    for found in run(listening, os.getpid()):
        assert len(found) >= 2  # the store and this worker
        assert all(ipaddress.ip_address(address).is_loopback for address in found)


def nothing(local_rank: int, *args: object) -> None:
    return None


def test_runs_at_the_same_time_do_not_meet() -> None:
    """KNOWN-FAILURES 19: there is no fixed port."""
    results: list[object] = []
    runs = [threading.Thread(target=lambda: results.append(run(place))) for _ in range(3)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    assert results == [[(rank, 2, rank, 2, 0, 1, 2) for rank in range(2)]] * 3


# Which start method


def closure() -> Callable[[int], None]:
    def inner(local_rank: int) -> None:
        return None

    return inner


@pytest.mark.parametrize(
    ("fn", "args", "named"),
    [
        (lambda local_rank: None, (), "function <lambda>"),
        (closure(), (), "function closure.<locals>.inner"),
        (nothing, (1, (i for i in range(3))), "argument 1, a generator,"),
        (nothing, (threading.Lock(),), "argument 0, a lock,"),
    ],
)
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_what_cannot_be_sent_is_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, method: str, fn: Callable[..., Any], args: tuple[Any, ...], named: str
) -> None:
    resource_tracker.ensure_running()  # Python starts it with whatever it starts first
    monkeypatch.setattr(forkserver, "connect_to_new_process", lambda fds: pytest.fail("a process was asked for"))
    monkeypatch.setattr(util, "spawnv_passfds", lambda *args: pytest.fail("a process was started"))
    with pytest.raises(idist.ConfigError, match="cannot be sent to another process") as caught:
        run(fn, *args, start_method=method)
    assert named in str(caught.value)
    assert "start_method='fork'" in str(caught.value)


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_a_device_context_must_not_be_forked(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """KNOWN-FAILURES 28: an error that says what to do, before forking."""
    monkeypatch.setattr(getattr(torch, device), "is_initialized", lambda: True)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("it was forked"))
    with pytest.raises(idist.ConfigError, match=f"used {device} already.*start_method='forkserver'"):
        run(nothing, start_method="fork")


def test_functions_of_a_notebook_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher._default_start_method(nothing) == "forkserver"
    monkeypatch.setattr("builtins.__IPYTHON__", True, raising=False)
    assert launcher._default_start_method(nothing) == "fork"
