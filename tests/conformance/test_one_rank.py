"""one_rank_only and one_rank_first: what one rank does for all, and what becomes of its failures."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import idist
from conformance.values import last, of_all, raises, same

BAD = [-1, 100, 0.0, "0", None, True]
MESSAGES = {
    "plain": "disk full",
    "empty": "",
    "non-ASCII": "é 日本",
    "long": "x" * 10_000,
    "long and non-ASCII": "aé" * 500,
    "lone surrogate": "a\udc80",
}


class Unusual(Exception):
    pass


@pytest.mark.parametrize("with_barrier", [False, True])
@pytest.mark.parametrize("leader", ["first", "last"])
def test_only_one_rank_runs(with_barrier: bool, leader: str) -> None:
    rank = 0 if leader == "first" else last()
    ran = []

    @idist.one_rank_only(rank=rank, with_barrier=with_barrier)
    def work(a: int, *, b: str) -> str:
        """Its own words."""
        ran.append(idist.get_rank())
        return f"{a}{b}"

    result = work(1, b="é")
    same(result, "1é" if idist.get_rank() == rank else None)
    same(idist.all_gather(ran), [[rank] if other == rank else [] for other in of_all(int)])
    assert (work.__name__, work.__doc__) == ("work", "Its own words.")


def test_rank_0_by_default_and_without_waiting() -> None:
    @idist.one_rank_only()
    def work() -> float:
        time.sleep(0.1)
        return time.monotonic()

    done = work()
    left = idist.all_gather((done, time.monotonic()))
    assert [when is not None for when, _ in left] == [rank == 0 for rank in of_all(int)]


def test_with_barrier_nobody_goes_on_before_it_is_done() -> None:
    @idist.one_rank_only(rank=last(), with_barrier=True)
    def work() -> float:
        time.sleep(0.1)
        return time.monotonic()

    done = work()
    left = idist.all_gather((done, time.monotonic()))
    assert all(left[last()][0] <= moment for _, moment in left)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("leader", ["first", "last"])
def test_one_rank_goes_first(local: bool, leader: str) -> None:
    ranks = idist.get_nproc_per_node() if local else idist.get_world_size()
    rank = 0 if leader == "first" else ranks - 1
    with idist.one_rank_first(rank=rank, local=local):
        came = time.monotonic()
        mine = idist.get_local_rank() if local else idist.get_rank()
        if mine == rank:
            time.sleep(0.1)
        left = time.monotonic()
    moments = idist.all_gather((idist.get_node_rank() if local else 0, mine == rank, came, left))
    ends = {node: left for node, leads, _, left in moments if leads}
    assert all(ends[node] <= came for node, leads, came, _ in moments if not leads)


def test_others_run_the_block_together() -> None:
    """After the leader all may use collectives again."""
    for _ in range(3):
        with idist.one_rank_first():
            pass
        same(idist.all_reduce(1), idist.get_world_size())


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("leader", ["first", "last"])
def test_failure_of_the_first_rank_is_an_error_on_every_rank(message: str, leader: str) -> None:
    """KNOWN-FAILURES 15: rank 0 raised inside one_rank_first and caught it; the others waited for ever."""
    rank = 0 if leader == "first" else last()
    ran = False
    try_ = pytest.raises(Unusual) if idist.get_rank() == rank else raises(idist.PeerFailed, *told(rank, message))
    with try_ as caught, idist.one_rank_first(rank=rank):
        ran = True
        raise Unusual(MESSAGES[message])
    if idist.get_rank() == rank:
        assert str(caught.value) == MESSAGES[message]
    assert ran == (idist.get_rank() == rank)
    same(idist.all_gather(idist.get_rank()), of_all(int))


@pytest.mark.parametrize("message", MESSAGES)
def test_failure_of_the_local_first_rank_is_an_error_on_its_node(message: str) -> None:
    """KNOWN-FAILURES 15, with local=True."""
    leads = idist.get_local_rank() == 0
    leaders = [rank for _, rank in sorted((local, rank) for rank, local in enumerate(_local_ranks()) if local == 0)]
    with pytest.raises(Unusual if leads else idist.PeerFailed) as caught, idist.one_rank_first(local=True):
        raise Unusual(MESSAGES[message])
    if not leads:
        assert "Unusual" in str(caught.value)
        assert any(f"rank {leader} failed" in str(caught.value) for leader in leaders)
    same(idist.all_gather(idist.get_rank()), of_all(int))


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("leader", ["first", "last"])
def test_failure_of_the_only_rank_is_an_error_on_every_rank(message: str, leader: str) -> None:
    """KNOWN-FAILURES 15, for one_rank_only(with_barrier=True)."""
    rank = 0 if leader == "first" else last()

    @idist.one_rank_only(rank=rank, with_barrier=True)
    def work() -> None:
        raise Unusual(MESSAGES[message])

    if idist.get_rank() == rank:
        with pytest.raises(Unusual) as caught:
            work()
        assert str(caught.value) == MESSAGES[message]
    else:
        with raises(idist.PeerFailed, "work", *told(rank, message)):
            work()
    same(idist.all_gather(idist.get_rank()), of_all(int))


def test_failure_without_barrier_stays_where_it_is() -> None:
    @idist.one_rank_only(rank=last())
    def work() -> None:
        raise Unusual("mine")

    if idist.get_rank() == last():
        with pytest.raises(Unusual, match="mine"):
            work()
    else:
        work()
    same(idist.all_gather(idist.get_rank()), of_all(int))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, MemoryError])
def test_whatever_ends_the_first_rank_the_others_hear_of_it(kind: type[BaseException]) -> None:
    @idist.one_rank_only(with_barrier=True)
    def work() -> None:
        raise kind

    if idist.get_rank() == 0:
        with pytest.raises(kind):
            work()
    else:
        with raises(idist.PeerFailed, "rank 0 failed", kind.__name__):
            work()


def test_failure_of_another_rank_is_its_own() -> None:
    if last() == idist.get_rank() != 0:
        with pytest.raises(Unusual, match="mine"), idist.one_rank_first():
            raise Unusual("mine")
    else:
        with idist.one_rank_first():
            pass
    same(idist.all_gather(idist.get_rank()), of_all(int))


def test_one_inside_the_other() -> None:
    @idist.one_rank_only(with_barrier=True)
    @idist.one_rank_only()
    def work() -> torch.Tensor:
        return torch.ones(1)

    assert (work() is None) == (idist.get_rank() != 0)


@pytest.mark.parametrize("rank", BAD, ids=repr)
def test_bad_rank(rank: Any) -> None:
    words = f"between 0 and {last()}", repr(rank)
    for with_barrier in (False, True):
        work = idist.one_rank_only(rank=rank, with_barrier=with_barrier)(pytest.fail)
        with raises(idist.ConfigError, *words):
            work("it ran")
    for local in (False, True):
        with raises(idist.ConfigError, "between 0 and", repr(rank)), idist.one_rank_first(rank=rank, local=local):
            pytest.fail("it ran")


def told(rank: int, message: str) -> tuple[str, ...]:
    """What the others are told; of a long message, the beginning."""
    readable = "" if message == "lone surrogate" else MESSAGES[message][:100]
    return f"rank {rank} failed", f"Unusual: {readable}"


def _local_ranks() -> list[int]:
    return idist.all_gather(idist.get_local_rank())  # type: ignore[no-any-return]
