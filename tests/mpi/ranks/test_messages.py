"""Point to point, groups, objects, and what happens when somebody does not come."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

import idist


def test_ring(rank: int, size: int) -> None:
    out, right, left = torch.zeros(5), (rank + 1) % size, (rank - 1) % size
    sending = dist.isend(torch.full((5,), float(rank)), right)
    dist.recv(out, left)
    assert sending is not None
    sending.wait()
    assert out.tolist() == [float(left)] * 5


def test_tags_tell_messages_apart(rank: int, size: int) -> None:
    right, left = (rank + 1) % size, (rank - 1) % size
    sent = [dist.isend(torch.tensor([float(tag)]), right, tag=tag) for tag in (1, 2, 3)]
    for tag in (3, 1, 2):
        out = torch.zeros(1)
        dist.recv(out, left, tag=tag)
        assert out.item() == tag
    for work in sent:
        assert work is not None
        work.wait()


def test_from_anybody(rank: int, size: int) -> None:
    if rank:
        dist.send(torch.tensor([float(rank)]), 0)
        return
    heard = {}
    for _ in range(size - 1):
        out = torch.zeros(1)
        source = dist.recv(out)
        heard[source] = out.item()
    assert heard == {other: float(other) for other in range(1, size)}


def test_batch(rank: int, size: int) -> None:
    given, out = torch.full((3,), float(rank)), torch.zeros(3)
    operations = [dist.P2POp(dist.isend, given, (rank + 1) % size), dist.P2POp(dist.irecv, out, (rank - 1) % size)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert out.tolist() == [float((rank - 1) % size)] * 3


def test_objects(rank: int, size: int) -> None:
    mine: dict[str, Any] = {"rank": rank, "text": "é" * rank}
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, mine)
    assert [each["rank"] for each in gathered] == list(range(size))
    told: list[Any] = [mine] if rank == size - 1 else [None]
    dist.broadcast_object_list(told, size - 1)
    assert told == [{"rank": size - 1, "text": "é" * (size - 1)}]
    at_0: list[Any] | None = [None] * size if rank == 0 else None
    dist.gather_object(mine, at_0)
    assert at_0 == (gathered if rank == 0 else None)
    share: list[Any] = [None]
    dist.scatter_object_list(share, gathered if rank == 0 else None)
    assert share == [mine]


def test_groups(rank: int, size: int) -> None:
    """Each pair of neighbours is a group, and the last ranks the other way round are one."""
    for first in range(size - 1):
        pair = dist.new_group([first, first + 1])
        if rank in (first, first + 1):
            tensor = torch.tensor([float(rank)])
            dist.all_reduce(tensor, group=pair)
            assert tensor.item() == 2 * first + 1
    backwards = dist.new_group([size - 1, 0])
    if rank in (0, size - 1):
        gathered = torch.zeros(2)
        dist.all_gather_single(gathered, torch.tensor([float(rank)]), group=backwards)
        assert sorted(gathered.tolist()) == [0.0, float(size - 1)]


def test_many_groups(rank: int, size: int) -> None:
    for step in range(100):
        group = dist.new_group([0, size - 1])
        if rank in (0, size - 1):
            tensor = torch.tensor([step])
            dist.all_reduce(tensor, group=group)
            assert tensor.item() == 2 * step
            dist.destroy_process_group(group)


def test_not_all_come(rank: int, size: int) -> None:
    """The one that waits hears so when the time is over, and the other groups do not suffer."""
    group = dist.new_group(list(range(size)), timeout=timedelta(seconds=1))
    idist.barrier()
    if rank == 0:
        begun = time.monotonic()
        with pytest.raises(RuntimeError, match=r"all_reduce timed out after 1 s.*did not come"):
            dist.all_reduce(torch.ones(3), group=group)
        assert 1 <= time.monotonic() - begun < 5
    idist.barrier()
    assert idist.all_reduce(1) == size


def test_not_all_make_a_group(rank: int, size: int) -> None:
    if rank == 0:
        with pytest.raises(RuntimeError, match=rf"1 of the 2 ranks of the group \[0, {size - 1}\] came to make it"):
            dist.new_group([0, size - 1], timeout=timedelta(seconds=1), use_local_synchronization=True)
    idist.barrier()
