"""Many times over, in the long run by `make soak`, nothing grows: no descriptor, no thread, no memory.

What is measured comes after a warm-up: torch and the allocator keep what they have needed once.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from processes import LOOPBACK, free_port, run_ranks

import idist

WORLD = 4
DELAY_S = 0.002
LONGEST_S = 1800
WARN_S = 8.0
SOAK = pytest.mark.soak


class Held(NamedTuple):
    """What a process holds."""

    descriptors: int
    threads: int
    megabytes: float


def held() -> Held:
    """Without what comes and goes: the watch asks the store by a socket that it closes again."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    threads = len(os.listdir("/proc/self/task"))
    descriptors = []
    for _ in range(5):
        descriptors.append(len(os.listdir("/proc/self/fd")))
        time.sleep(0.02)
    return Held(min(descriptors), threads, pages * os.sysconf("SC_PAGE_SIZE") / 2**20)


def assert_no_growth(before: Held, after: Held, *, megabytes: float) -> None:
    print(f"{before} -> {after}")
    assert after.descriptors <= before.descriptors
    assert after.threads <= before.threads
    assert after.megabytes <= before.megabytes + megabytes


# Collectives

Group = tuple[int, ...]
GROUPS: tuple[Group, ...] = (tuple(range(WORLD)), (0, 1), (1, 2, 3), (0, 3), (2,))


def total(group: Group, value: int) -> int:
    return sum(rank + value for rank in group)


def reduces_numbers(rank: int, group: Group, value: int) -> None:
    assert idist.all_reduce(rank + value, group=group) == total(group, value)


def reduces_tensors(rank: int, group: Group, value: int) -> None:
    tensor = torch.full((value % 300 + 1,), float(rank + value))
    assert torch.equal(idist.all_reduce(tensor, group=group), torch.full_like(tensor, total(group, value)))


def gathers_tensors(rank: int, group: Group, value: int) -> None:
    gathered = idist.all_gather(torch.tensor([rank, value]), group=group)
    assert gathered.view(-1, 2).tolist() == [[each, value] for each in group]


def gathers_objects(rank: int, group: Group, value: int) -> None:
    mine = {"rank": rank, "much": "x" * (value % 2000)}
    assert idist.all_gather(mine, group=group) == [{**mine, "rank": each} for each in group]


def broadcasts(rank: int, group: Group, value: int) -> None:
    src = group[value % len(group)]
    assert idist.broadcast(f"é{value}" if rank == src else None, src=src, group=group, safe_mode=True) == f"é{value}"


def meets(rank: int, group: Group, value: int) -> None:
    idist.barrier(group=group)


KINDS: tuple[Callable[[int, Group, int], None], ...] = (
    reduces_numbers,
    reduces_tensors,
    gathers_tensors,
    gathers_objects,
    broadcasts,
    meets,
)


def collectives(rank: int, times: int) -> tuple[Held, Held]:
    """The same draws on all ranks, but for the delays."""
    idist.initialize("gloo", timeout=60, warn_after=WARN_S)
    draws, delays = random.Random(1), random.Random(rank)
    warm_up, before = times // 4, held()
    for turn in range(warm_up + times):
        if turn == warm_up:
            time.sleep(WARN_S / 4)  # the watch has a connection of its own, from its first look on
            before = held()
        kind, group, value = draws.choice(KINDS), draws.choice(GROUPS), draws.randrange(10_000)
        if delays.random() < 0.2:
            time.sleep(delays.uniform(0, DELAY_S))
        if rank in group:
            kind(rank, group, value)
    after = held()
    idist.barrier()
    idist.finalize()
    return before, after


@pytest.mark.timeout(LONGEST_S)
@pytest.mark.parametrize("times", [200, pytest.param(10_000, marks=SOAK)])
def test_collectives(times: int) -> None:
    port = free_port()
    place = {"WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_ADDR": LOOPBACK, "MASTER_PORT": port}
    ranks = run_ranks(
        collectives, WORLD, times, env=lambda rank: {**place, "RANK": rank, "LOCAL_RANK": rank}, timeout=LONGEST_S - 60
    )
    for before, after in ranks:
        assert_no_growth(before, after, megabytes=8)


# Contexts


def contexts(rank: int, times: int) -> tuple[Held, Held]:
    warm_up, before = times // 4, held()
    for turn in range(warm_up + times):
        if turn == warm_up:
            before = held()
        idist.initialize("gloo", timeout=60)
        assert idist.all_gather(rank) == [0, 1]
        assert idist.all_reduce(turn, group=[0, 1]) == 2 * turn
        idist.finalize()
    return before, held()


@pytest.mark.timeout(LONGEST_S)
@pytest.mark.parametrize("times", [12, pytest.param(200, marks=SOAK)])
def test_contexts(times: int) -> None:
    port = free_port()
    place = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": LOOPBACK, "MASTER_PORT": port}
    ranks = run_ranks(
        contexts, 2, times, env=lambda rank: {**place, "RANK": rank, "LOCAL_RANK": rank}, timeout=LONGEST_S - 60
    )
    for before, after in ranks:
        assert_no_growth(before, after, megabytes=4 + times / 20)


# Runs


def nothing(local_rank: int, *args: Any) -> int:
    return local_rank


@pytest.mark.timeout(LONGEST_S)
@pytest.mark.parametrize("times", [10, pytest.param(100, marks=SOAK)])
def test_runs(times: int) -> None:
    """Also in the threads of this process."""
    warm_up = 1 + times // 10
    for turn in range(warm_up + times):
        if turn == warm_up:
            before, names = held(), {thread.name for thread in threading.enumerate()}
        assert idist.spawn("gloo", nothing, (turn,), nproc_per_node=2, timeout=60) == [0, 1]
    assert {thread.name for thread in threading.enumerate()} <= names
    assert_no_growth(before, held(), megabytes=8)
