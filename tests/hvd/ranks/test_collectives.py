"""What Horovod cannot do, or does otherwise, and our users see nothing of."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

import idist
from idist.errors import ConfigError

REFUSED = (torch.uint8, torch.int16, torch.bool, torch.bfloat16)


def test_names_and_place(rank: int, size: int, hvd: Any) -> None:
    assert (idist.backend(), idist.model_name()) == ("horovod", "horovod-dist")
    assert (rank, size) == (hvd.rank(), hvd.size())
    assert (idist.get_local_rank(), idist.get_nproc_per_node()) == (hvd.local_rank(), hvd.local_size())
    assert idist.has_hvd_support is True
    assert "horovod" in idist.available_backends()


@pytest.mark.parametrize("dtype", REFUSED, ids=str)
def test_types_that_it_does_not_reduce(dtype: torch.dtype, rank: int, size: int, hvd: Any) -> None:
    mine = torch.tensor([rank % 2, 1, 0]).to(dtype)
    with pytest.raises(ValueError, match="not supported"):
        hvd.allreduce(mine, op=hvd.Sum, name="refused")
    expected = torch.tensor([size // 2, size, 0]).to(dtype)
    assert torch.equal(idist.all_reduce(mine), expected)


def test_booleans_and_scalars_that_it_does_not_gather(rank: int, size: int, hvd: Any) -> None:
    with pytest.raises(ValueError, match="not supported"):
        hvd.allgather(torch.tensor([True]), name="refused")
    with pytest.raises(IndexError):
        hvd.allgather(torch.tensor(1.0), name="refused")
    assert idist.all_gather(torch.tensor(rank == 0)).tolist() == [r == 0 for r in range(size)]
    assert idist.all_gather(torch.tensor(1.0 + rank)).tolist() == [1.0 + r for r in range(size)]


def test_and_and_or(rank: int, size: int) -> None:
    mine = torch.tensor([0b110 | rank, 1 << rank])
    together = [0b110, 0] if size > 1 else mine.tolist()
    either = [0b110 | (size - 1), (1 << size) - 1]
    if size > 2:
        either[0] = 0b111
    assert idist.all_reduce(mine, "AND").tolist() == together
    assert idist.all_reduce(mine, "OR").tolist() == either


def test_a_group_operation_and_then_a_global_one(rank: int, size: int) -> None:
    """KNOWN-FAILURES 26: a collective that only some ranks ran, then a global one, never ended."""
    for repeated in range(3):
        if rank > 0:
            ranks = list(range(1, size))
            assert idist.all_reduce(torch.tensor(rank), group=ranks).item() == sum(ranks)
            if rank == 1:
                assert idist.all_gather(repeated, group=[1]) == [repeated]
        assert idist.all_reduce(torch.tensor(1.0)).item() == size
    idist.barrier()


def test_a_group_that_is_the_world(size: int, hvd: Any) -> None:
    """A process set with the ranks of the global one is refused: `Attempted to add a duplicate process set`."""
    ranks = list(range(size))
    with pytest.raises(ValueError, match="duplicate"):
        hvd.add_process_set(ranks)
    assert idist.new_group(ranks) is hvd.global_process_set
    assert idist.all_reduce(1.5, group=ranks) == 1.5 * size
    assert idist.all_reduce(torch.ones(1), group=idist.new_group(ranks)).item() == size


def test_groups_are_process_sets_made_by_their_members_alone(rank: int, size: int, hvd: Any) -> None:
    """Horovod needs all ranks for one; the others are busy here."""
    if rank == 0:
        time.sleep(0.5)
        return
    ranks = list(range(1, size))
    group = idist.new_group(ranks)
    assert isinstance(group, hvd.ProcessSet) or size == 1
    assert idist.all_reduce(1, group=group) == len(ranks)
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum, process_set=group, name=f"own {ranks}").item() == len(ranks)
    assert idist.new_group(ranks) is group


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_groups_asked_for_in_different_orders(order: str, rank: int, size: int) -> None:
    """Horovod numbers process sets; where ranks number them differently, it ends with an error."""
    if size < 4:
        size = 2
    pairs = [[a, b] for a in range(size) for b in range(a + 1, size) if rank in (a, b)]
    for pair in pairs if (rank % 2 == 0) == (order == "ascending") else pairs[::-1]:
        idist.new_group(pair)
    for pair in pairs:
        assert idist.all_gather(rank, group=pair) == pair


def test_options_of_groups_are_refused() -> None:
    with pytest.raises(TypeError, match="timeuot"):
        idist.new_group([0], timeuot=3)


def test_local_ranks_have_a_group(size: int) -> None:
    with idist.one_rank_first(local=True):
        pass
    assert idist.all_reduce(1) == size


def test_objects_in_groups(rank: int, size: int) -> None:
    group = [rank // 2 * 2, rank // 2 * 2 + 1]
    value = {"rank": rank, "text": "é" * 1000}
    assert idist.broadcast(value, src=group[1], group=group) == value | {"rank": group[1]}


def test_many_at_once(rank: int, size: int) -> None:
    works = [idist.all_reduce(torch.full((3,), float(rank)), async_op=True) for _ in range(50)]
    works += [idist.all_gather(torch.tensor(rank), async_op=True) for _ in range(50)]
    results = [work.wait() for work in reversed(works)]
    assert all(result.tolist() == list(range(size)) for result in results[:50])
    assert all(result.tolist() == [sum(range(size))] * 3 for result in results[50:])


def test_adasum_that_is_not_built_is_an_error(hvd: Any) -> None:
    """Horovod itself ends the process: `No Adasum operation enabled`."""
    assert not hvd.mpi_enabled()
    model = idist.auto_model(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="built with MPI"):
        idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.1), op=hvd.Adasum)


def test_threads_of_ours_are_daemons() -> None:
    ours = [thread for thread in threading.enumerate() if "idist" in thread.name]
    assert ours
    assert all(thread.daemon for thread in ours)
