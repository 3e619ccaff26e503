"""KNOWN-FAILURES 25: a worker fails; all end within seconds, and the caller gets the first failure."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import idist

DEADLINE_S = 5.0


def run(fn: Callable[..., Any], *args: Any, nproc_per_node: int = 2, **options: Any) -> list[Any]:
    """Fail within the deadline; only then is a failure quick and not a timeout. It counts from the call of ``fn``."""
    with TemporaryDirectory() as folder:
        began = time.monotonic()
        try:
            arguments = (folder, fn, *args)
            return idist.spawn("gloo", noting, arguments, nproc_per_node=nproc_per_node, timeout=60, **options)
        finally:
            calls = [float(said) for note in Path(folder).iterdir() if (said := note.read_text())]
            assert time.monotonic() - max(calls, default=began) < DEADLINE_S


def noting(local_rank: int, folder: str, fn: Callable[..., Any], *args: Any) -> Any:
    Path(folder, str(local_rank)).write_text(str(time.monotonic()))  # of the clock that all processes share
    return fn(local_rank, *args)


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    """Its start is not part of any deadline."""
    idist.spawn("gloo", nothing, timeout=60)


def nothing(local_rank: int) -> None:
    return None


def failing(local_rank: int, how: str, peers: str) -> None:
    """Rank 1 fails; what the others do meanwhile."""
    if local_rank == 1:
        HOW[how]()
    if peers == "collective":
        idist.all_reduce(torch.ones(3))
    elif peers == "backward":
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        model(torch.ones(1, 2)).sum().backward()
    else:
        time.sleep(60)


def raises() -> None:
    raise ValueError("boom of rank 1")


class Unpicklable(Exception):
    def __init__(self, lock: object, more: object) -> None:
        super().__init__("has a lock")
        self.lock = lock

    def __reduce__(self) -> str:
        raise TypeError("not me")


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("cannot even be shown")


def raises_unpicklable() -> None:
    raise Unpicklable(threading.Lock(), None)


def raises_unspeakable() -> None:
    raise Unspeakable


def leaves_in_peace() -> None:
    """The user's code closes its connections before we hear of the failure."""
    try:
        raise ValueError("boom of rank 1")
    finally:
        idist.finalize()
        time.sleep(0.2)


HOW: dict[str, Callable[[], object]] = {
    "raise": raises,
    "raise unpicklable": raises_unpicklable,
    "raise unspeakable": raises_unspeakable,
    "finalize and raise": leaves_in_peace,
    "sys.exit(3)": lambda: sys.exit(3),
    "sys.exit(text)": lambda: sys.exit("no data"),
    "os._exit(4)": lambda: os._exit(4),
    "os._exit(0)": lambda: os._exit(0),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "SIGABRT": lambda: os.kill(os.getpid(), signal.SIGABRT),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
}


@pytest.mark.parametrize("peers", ["collective", "backward", "sleep"])
@pytest.mark.parametrize(
    ("how", "exitcode", "details"),
    [
        ("raise", None, "ValueError: boom of rank 1"),
        ("raise unpicklable", None, "Unpicklable: has a lock"),
        ("raise unspeakable", None, "Unspeakable"),
        ("finalize and raise", None, "ValueError: boom of rank 1"),
        ("sys.exit(3)", 3, "SystemExit: 3"),
        ("sys.exit(text)", 1, "SystemExit: no data"),
        ("os._exit(4)", 4, "exit code 4"),
        ("os._exit(0)", 0, "exit code 0"),
        ("SIGKILL", -9, "signal 9 (SIGKILL)"),
        ("SIGTERM", -15, "signal 15 (SIGTERM)"),
        ("SIGSEGV", -11, "signal 11 (SIGSEGV)"),
        ("SIGABRT", -6, "signal 6 (SIGABRT). A library ended it, and says above why."),
        ("SIGINT", None, "KeyboardInterrupt"),
    ],
)
def test_the_first_failure_is_told(how: str, exitcode: int | None, details: str, peers: str) -> None:
    with pytest.raises(idist.WorkerFailed) as caught:
        run(failing, how, peers, nproc_per_node=3)
    assert caught.value.rank == 1
    assert caught.value.exitcode == exitcode
    assert details in caught.value.details
    assert str(caught.value).startswith("rank 1 failed first")
    if exitcode is None:
        _, first, *_ = caught.value.details.splitlines()
        assert "test_worker_failures.py" in first  # our own frames help nobody


def test_workers_print_nothing_themselves(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(idist.WorkerFailed):
        run(failing, "raise", "collective")
    assert capfd.readouterr() == ("", "")


def leader_fails(local_rank: int) -> None:
    if local_rank == 0:
        raise idist.PeerFailed("rank 1 raised")
    time.sleep(0.2)
    raise ValueError("the cause")


def test_a_consequence_is_not_the_first_failure() -> None:
    with pytest.raises(idist.WorkerFailed, match="the cause") as caught:
        run(leader_fails)
    assert caught.value.rank == 1


def only_rank_0(local_rank: int) -> None:
    if local_rank == 0:
        idist.all_reduce(1.0)


def test_a_call_that_only_one_rank_makes() -> None:
    with pytest.raises(idist.WorkerFailed, match="all_reduce") as caught:
        run(only_rank_0, nproc_per_node=3)
    assert caught.value.rank == 0
    assert "No other rank had failed, but ranks 1, 2 had returned." in caught.value.details


def one_after_the_other(local_rank: int) -> None:
    time.sleep(0.1 * (3 - local_rank))
    raise ValueError(f"rank {local_rank}")


def test_of_several_failures_the_first_counts() -> None:
    with pytest.raises(idist.WorkerFailed) as caught:
        run(one_after_the_other, nproc_per_node=3)
    assert caught.value.rank == 2


def stopped(local_rank: int) -> None:
    if local_rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.3)
    raise ValueError("the other one is stopped")


def test_a_stopped_worker_is_ended() -> None:
    with pytest.raises(idist.WorkerFailed, match="the other one is stopped"):
        run(stopped)


def stops(local_rank: int, others_wait: bool) -> None:
    if local_rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if others_wait:
        idist.barrier()


@pytest.mark.parametrize("others_wait", [True, False])
def test_a_stop_is_the_cause_of_what_times_out(others_wait: bool) -> None:
    """Also where nobody waits for the rank that is stopped; a stop is then as long as any wait may be."""
    with pytest.raises(idist.WorkerFailed, match="is stopped, as by SIGSTOP") as caught:
        idist.spawn("gloo", stops, (others_wait,), nproc_per_node=2, timeout=4)
    assert caught.value.rank == 1


def stubborn(local_rank: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if local_rank == 1:
        raise ValueError("boom")
    while True:
        try:
            time.sleep(60)
        except BaseException:
            continue


def test_a_stubborn_worker_is_ended() -> None:
    with pytest.raises(idist.WorkerFailed, match="boom"):
        run(stubborn)


class Slow(Dataset[int]):
    def __init__(self, failing: bool) -> None:
        self.failing = failing

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        if self.failing:
            raise KeyError("no such item")
        time.sleep(1)
        return index


def loading(local_rank: int) -> None:
    for _ in DataLoader(Slow(failing=local_rank == 1), num_workers=2):
        pass


def test_processes_of_a_data_loader_end_too() -> None:
    """Both those of the rank that fails and those of the others."""
    with pytest.raises(idist.WorkerFailed, match="no such item") as caught:
        run(loading)
    assert caught.value.rank == 1


# Ends that are no failures, and odd results


def leaves(local_rank: int, code: int | None) -> int:
    if local_rank == 0:
        sys.exit(code)
    return 1


@pytest.mark.parametrize("code", [None, 0])
def test_a_clean_exit_is_a_return_of_nothing(code: int | None) -> None:
    assert run(leaves, code) == [None, 1]


def returns_lock(local_rank: int) -> object:
    return threading.Lock()


def test_a_result_that_cannot_be_pickled() -> None:
    with pytest.raises(idist.WorkerFailed, match="what the function returned, a lock, cannot be sent"):
        run(returns_lock)


class Brittle:
    def __reduce__(self) -> tuple[object, ...]:
        return explode, ()


def explode() -> None:
    raise ValueError("at the receiver")


def returns_brittle(local_rank: int) -> Brittle:
    return Brittle()


def test_a_result_that_cannot_be_rebuilt() -> None:
    with pytest.raises(idist.WorkerFailed, match="cannot be rebuilt here: ValueError: at the receiver"):
        run(returns_brittle)


def receives_brittle(local_rank: int, brittle: object) -> None:
    raise AssertionError("not reached")


def test_an_argument_that_cannot_be_rebuilt() -> None:
    with pytest.raises(idist.WorkerFailed, match="ValueError: at the receiver"):
        run(receives_brittle, Brittle())


# The start


def test_a_start_that_fails_in_the_worker() -> None:
    with pytest.raises(idist.WorkerFailed, match=r"ConfigError: .*cuda"):
        run(nothing, device="cuda:0")


def test_the_next_run_is_as_good_as_the_first() -> None:
    with pytest.raises(idist.WorkerFailed):
        run(failing, "SIGKILL", "collective")
    assert run(nothing) == [None, None]


def test_frames_of_the_error_hold_no_socket() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(idist.WorkerFailed) as caught:
        run(failing, "raise", "sleep")
    assert len(os.listdir("/proc/self/fd")) <= before
    del caught
