"""The harness itself: what goes wrong on a rank is seen, ends in time, and leaves working ranks behind."""

from __future__ import annotations

import os
import time

import pytest

import idist
from conformance.values import last, of_all, same
from conformance.worlds import GRACE_S, Alone, Processes, Threads, World

OWN = (Alone, Threads, Processes)
"""Not ranks that a launcher has started: those end with the first failure."""


def works() -> None:
    same(idist.all_gather(idist.get_rank()), of_all(int))


def succeeds(word: str) -> None:
    assert word == "é"


def fails_on_the_last_rank(word: str) -> None:
    if idist.get_rank() == last():
        raise ZeroDivisionError(word)
    idist.barrier()


def is_out_of_step() -> None:
    if idist.get_rank() == last():
        idist.all_gather("one more")


def dies_on_the_last_rank() -> None:
    if idist.get_rank() == last():
        os._exit(3)
    idist.barrier()


@pytest.mark.ranks(kind=OWN)
def test_every_rank_runs_the_body(world: World) -> None:
    world.run(succeeds, {"word": "é"})
    with pytest.raises(AssertionError):
        world.run(succeeds, {"word": "e"})
    world.repair()
    world.run(works, {})


@pytest.mark.ranks(kind=OWN)
def test_failure_of_one_rank_is_seen_at_once(world: World) -> None:
    start = time.monotonic()
    with pytest.raises((ZeroDivisionError, AssertionError), match=r"(?s)\bdisk full"):
        world.run(fails_on_the_last_rank, {"word": "disk full"})
    assert time.monotonic() - start < GRACE_S + 5
    world.repair()
    world.run(works, {})


@pytest.mark.ranks(kind=OWN, at_least=2)
def test_ranks_that_are_out_of_step_are_seen(world: World) -> None:
    with pytest.raises((AssertionError, idist.CollectiveMismatch)):
        world.run(is_out_of_step, {})
    world.repair()
    world.run(works, {})


@pytest.mark.ranks(kind=Processes)
def test_death_of_one_rank_is_seen_at_once(world: World) -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank \d+:\nits process ended"):
        world.run(dies_on_the_last_rank, {})
    assert time.monotonic() - start < GRACE_S + 5
    world.repair()
    world.run(works, {})
