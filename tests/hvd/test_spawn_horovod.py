"""Processes that idist starts for Horovod: what comes back, how they fail and end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import idist

pytestmark = pytest.mark.horovod

TIMEOUT_S = 60.0
FAILURE_S = 5.0


def run(fn: Callable[..., Any], *args: Any, nproc_per_node: int = 2, **options: Any) -> list[Any]:
    return idist.spawn("horovod", fn, args, nproc_per_node=nproc_per_node, **{"timeout": TIMEOUT_S, **options})


def place(local_rank: int, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    assert idist.get_local_rank() == local_rank
    ours = idist.get_rank(), idist.get_world_size(), idist.get_nproc_per_node(), idist.get_node_rank()
    return idist.backend(), *ours, idist.all_reduce(1), args, kwargs


def test_results_come_by_local_rank() -> None:
    """As often as one likes; and variables of this process stay as they are."""
    before = dict(os.environ)
    with idist.Parallel("horovod", nproc_per_node=3, timeout=TIMEOUT_S) as parallel:
        for number in range(2):
            results = parallel.run(place, number, key="é")
            assert results == [("horovod", rank, 3, 3, 0, 3, (number,), {"key": "é"}) for rank in range(3)]
    assert dict(os.environ) == before


def test_one_process() -> None:
    assert run(place, nproc_per_node=1) == [("horovod", 0, 1, 1, 0, 1, (), {})]


def here() -> list[tuple[Any, ...]]:
    """Started by ``python`` alone."""
    with idist.Parallel("horovod", timeout=TIMEOUT_S) as parallel:
        return parallel.run(place)


def listening(local_rank: int) -> set[str]:
    """The addresses at which this process listens."""
    sockets = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    idist.barrier()
    return found


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def test_ranks_of_one_node_listen_on_loopback_alone() -> None:
    assert set().union(*run(listening)) == {"0100007F"}


def failing(local_rank: int, how: str, clock: str, peers: str) -> None:
    """Rank 1 fails, and notes when; what the others do meanwhile."""
    idist.all_gather(local_rank, group=[0, 1]) if local_rank < 2 else None
    idist.barrier()
    if local_rank == 1:
        Path(clock).write_text(str(time.monotonic()))
        HOW[how]()
    if peers == "collective":
        idist.all_reduce(torch.ones(3))
    elif peers == "training":
        model = idist.auto_model(torch.nn.Linear(2, 2))
        idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.1))
        model(torch.ones(2)).sum().backward()
    elif peers == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(60)


def raises() -> None:
    raise ValueError("boom of rank 1")


HOW: dict[str, Callable[[], object]] = {
    "raise": raises,
    "sys.exit(3)": lambda: sys.exit(3),
    "os._exit(4)": lambda: os._exit(4),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSEGV": lambda: os.kill(os.getpid(), signal.SIGSEGV),
}
EXITCODES = {"raise": None, "sys.exit(3)": 3, "os._exit(4)": 4, "SIGKILL": -signal.SIGKILL, "SIGSEGV": -signal.SIGSEGV}


@pytest.mark.parametrize(
    ("how", "peers"),
    [*((how, "collective") for how in HOW), ("raise", "training"), ("raise", "sleep"), ("SIGKILL", "stopped")],
)
def test_the_first_failure_reaches_the_caller(how: str, peers: str, tmp_path: Path) -> None:
    """With the worker's own traceback; all ends within seconds."""
    clock = tmp_path / "failed"
    with pytest.raises(idist.WorkerFailed) as caught:
        run(failing, how, str(clock), peers, nproc_per_node=3)
    assert time.monotonic() - float(clock.read_text()) < FAILURE_S
    assert (caught.value.rank, caught.value.exitcode) == (1, EXITCODES[how])
    if how == "raise":
        assert "in raises\n" in caught.value.details
        assert caught.value.details.endswith("ValueError: boom of rank 1")


def absent(local_rank: int, what: str) -> tuple[str, float]:
    """Rank 1 does not join; rank 0 tells how it fared, and how long that took."""
    model = idist.auto_model(torch.nn.Linear(2, 2))
    optimizer = idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.1))
    idist.barrier()
    if local_rank == 1:
        time.sleep(6)
        return "", 0.0
    begun = time.monotonic()
    try:
        if what == "tensor":
            idist.all_reduce(torch.ones(2))
        elif what == "number":
            idist.all_reduce(1)
        elif what == "backward":
            model(torch.ones(1, 2)).sum().backward()
        elif what == "step":
            optimizer.step()
    except idist.PeerFailed as error:
        return str(error), time.monotonic() - begun
    return "nothing", time.monotonic() - begun


@pytest.mark.parametrize("what", ["tensor", "number", "backward", "step"])
def test_timeout(what: str) -> None:
    """Horovod has none. With Gloo even its stall check finds nothing."""
    (said, seconds), _ = run(absent, what, timeout=2)
    assert "within 2 s" in said
    assert 2 <= seconds < 5


def ends_early(local_rank: int) -> str:
    """Rank 1 has returned, and so ended Horovod, when rank 0 begins a collective."""
    idist.barrier()
    if local_rank == 1:
        return ""
    time.sleep(2)
    try:
        idist.all_reduce(1)
    except idist.PeerFailed as error:
        return str(error)
    return "nothing"


def test_a_rank_that_has_returned_is_noticed() -> None:
    said, _ = run(ends_early)
    assert "another rank failed, ended, or" in said


def group_after_the_end(local_rank: int) -> str:
    idist.barrier()
    if local_rank == 1:
        return ""
    time.sleep(2)
    try:
        idist.all_reduce(1, group=[0])
    except idist.PeerFailed as error:
        return str(error)
    return "nothing"


def test_a_group_after_another_rank_has_ended_is_an_error() -> None:
    said, _ = run(group_after_the_end)
    assert "another rank" in said


def mismatched(local_rank: int) -> list[str]:
    said = []
    for kind in ("shape", "dtype"):
        tensor = torch.ones(2 + local_rank if kind == "shape" else 2, dtype=(torch.float32, torch.float64)[local_rank])
        try:
            idist.all_reduce(tensor)
        except idist.CollectiveMismatch as error:
            said.append(str(error))
    return [*said, str(idist.all_reduce(1))]


def test_horovod_compares_what_the_ranks_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where we do not: it costs nothing more. Nothing is lost by it."""
    monkeypatch.delenv("IDIST_VERIFY")
    for said in run(mismatched):
        assert len(said) == 3
        assert all("Mismatched" in error for error in said[:2])
        assert said[2] == "2"


@pytest.mark.parametrize("option", ["timeuot", "pg_options", "comm"])
def test_unknown_options(option: str) -> None:
    with pytest.raises(TypeError, match=option):
        run(place, **{option: 3})


def test_device() -> None:
    with pytest.raises(idist.WorkerFailed, match="built without NCCL"):
        run(place, nproc_per_node=1, device="cuda")
