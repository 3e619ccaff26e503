"""torch.distributed's own functions, with every kind of tensor that they take."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

REALS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
COMPLEX = (torch.complex64, torch.complex128)
DTYPES = (*REALS, *WHOLES, *COMPLEX, torch.bool)
Op = dist.ReduceOp

REDUCTIONS: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor], tuple[torch.dtype, ...]]] = {
    "sum": (Op.SUM, torch.add, (*REALS, *WHOLES, *COMPLEX)),
    "product": (Op.PRODUCT, torch.mul, (*REALS, *WHOLES)),
    "min": (Op.MIN, torch.minimum, (*REALS, *WHOLES)),
    "max": (Op.MAX, torch.maximum, (*REALS, *WHOLES)),
    "and": (Op.BAND, torch.bitwise_and, (*WHOLES, torch.bool)),
    "or": (Op.BOR, torch.bitwise_or, (*WHOLES, torch.bool)),
    "xor": (Op.BXOR, torch.bitwise_xor, (*WHOLES, torch.bool)),
}
CASES = [(name, dtype) for name, (_, _, dtypes) in REDUCTIONS.items() for dtype in dtypes]


def given(rank: int, dtype: torch.dtype = torch.float32, length: int = 6) -> Tensor:
    """Small whole numbers, so that every type is exact: 1 to 3."""
    return ((torch.arange(length) * (rank + 1)) % 3 + 1).to(dtype)


def every(size: int, dtype: torch.dtype = torch.float32, length: int = 6) -> list[Tensor]:
    return [given(rank, dtype, length) for rank in range(size)]


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_all_reduce(rank: int, size: int, name: str, dtype: torch.dtype) -> None:
    op, combine, _ = REDUCTIONS[name]
    tensor = given(rank, dtype)
    dist.all_reduce(tensor, op)
    same(tensor, reduce(combine, every(size, dtype)))


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_reduce_scatter(rank: int, size: int, name: str, dtype: torch.dtype) -> None:
    op, combine, _ = REDUCTIONS[name]
    expected = reduce(combine, every(size, dtype, 5 * size)).chunk(size)[rank]
    out = torch.zeros(5, dtype=dtype)
    dist.reduce_scatter_single(out, given(rank, dtype, 5 * size), op)
    same(out, expected)
    out = torch.zeros(5, dtype=dtype)
    dist.reduce_scatter(out, list(given(rank, dtype, 5 * size).chunk(size)), op)
    same(out, expected)


@pytest.mark.parametrize("dtype", REALS)
def test_average(rank: int, size: int, dtype: torch.dtype) -> None:
    tensor = given(rank, dtype)
    dist.all_reduce(tensor, Op.AVG)
    same(tensor, reduce(torch.add, every(size, dtype)) / size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large(rank: int, size: int, dtype: torch.dtype) -> None:
    """More than one piece, which is where an order of calls matters; other operations come in between."""
    tensor = torch.full((3_000_001,), rank + 1, dtype=dtype)
    small = torch.ones(3)
    works = [dist.all_reduce(tensor, async_op=True), dist.all_reduce(small, async_op=True)]
    gathered = torch.zeros(size)
    works.append(dist.all_gather_single(gathered, torch.tensor([float(rank)]), async_op=True))
    for work in reversed(works) if rank % 2 else works:
        work.wait()
    same(tensor, torch.full((3_000_001,), size * (size + 1) // 2, dtype=dtype))
    same(small, torch.full((3,), float(size)))
    same(gathered, torch.arange(float(size)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_movements(rank: int, size: int, dtype: torch.dtype) -> None:
    mine, all_of_them, last = given(rank, dtype), every(size, dtype), size - 1
    tensor = mine.clone()
    dist.broadcast(tensor, last)
    same(tensor, all_of_them[last])

    parts = [torch.zeros_like(mine) for _ in range(size)]
    dist.all_gather(parts, mine)
    same(torch.stack(parts), torch.stack(all_of_them))
    out = torch.zeros(size * 6, dtype=dtype)
    dist.all_gather_single(out, mine)
    same(out, torch.cat(all_of_them))

    parts = [torch.zeros_like(mine) for _ in range(size)]
    dist.gather(mine, parts if rank == last else None, last)
    same(torch.stack(parts), torch.stack(all_of_them) if rank == last else torch.zeros(size, 6, dtype=dtype))
    out = torch.zeros_like(mine)
    dist.scatter(out, all_of_them if rank == last else None, last)
    same(out, mine)

    out = torch.zeros(2 * size, dtype=dtype)
    dist.all_to_all_single(out, given(rank, dtype, 2 * size))
    same(out, torch.cat([part.chunk(size)[rank] for part in every(size, dtype, 2 * size)]))


def test_reduce(rank: int, size: int) -> None:
    tensor = given(rank)
    dist.reduce(tensor, size - 1)
    if rank == size - 1:
        same(tensor, reduce(torch.add, every(size)))


def test_all_to_all_uneven(rank: int, size: int) -> None:
    """Rank r sends i + 1 rows to rank i, each with r in it."""
    sent = [other + 1 for other in range(size)]
    mine = torch.full((sum(sent), 3), float(rank))
    out = torch.zeros((rank + 1) * size, 3)
    dist.all_to_all_single(out, mine, [rank + 1] * size, sent)
    same(out[:, 0], torch.arange(float(size)).repeat_interleave(rank + 1))
    parts = [torch.zeros(rank + 1, 3) for _ in range(size)]
    dist.all_to_all(parts, list(mine.split(sent)))
    same(torch.cat(parts), out)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda flat: flat.view(3, 4).t(),
    "strided": lambda flat: flat.repeat_interleave(2)[::2],
    "offset": lambda flat: torch.cat([torch.zeros(5), flat])[5:],
    "channels last": lambda flat: flat.view(1, 3, 2, 2).contiguous(memory_format=torch.channels_last),
    "0-d": lambda flat: flat[7].clone(),
    "empty": lambda flat: flat[:0].clone(),
    "parameter": lambda flat: torch.nn.Parameter(flat.clone()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rank: int, size: int, layout: str) -> None:
    tensor, *all_of_them = (LAYOUTS[layout](given(r, length=12)) for r in (rank, *range(size)))
    with torch.no_grad():
        dist.all_reduce(tensor)
        same(tensor, reduce(torch.add, all_of_them).detach())
        parts = [torch.zeros_like(tensor) for _ in range(size)]
        dist.all_gather(parts, all_of_them[rank])
        same(torch.stack(parts), torch.stack(all_of_them).detach())
        dist.broadcast(tensor.copy_(all_of_them[rank]), size - 1)
        same(tensor.detach(), all_of_them[-1].detach())


def test_output_that_overlaps_the_input(rank: int, size: int) -> None:
    """FSDP gathers into what it gathers from."""
    whole = torch.zeros(size * 3)
    whole.view(size, 3)[rank] = float(rank)
    dist.all_gather_single(whole, whole.view(size, 3)[rank])
    same(whole, torch.arange(float(size)).repeat_interleave(3))
    dist.reduce_scatter_single(whole[:3], whole)
    same(whole[:3], torch.full((3,), float(rank * size)))


def test_output_that_is_not_contiguous(rank: int, size: int) -> None:
    out = torch.zeros(2, size * 3).t()[::1]
    dist.all_gather_single(out, torch.full((3, 2), float(rank)))
    same(out, torch.arange(float(size)).repeat_interleave(3)[:, None].expand(-1, 2))


def test_handles(rank: int, size: int) -> None:
    tensor = torch.ones(4)
    work = dist.all_reduce(tensor, async_op=True)
    assert work is not None
    doubled = work.get_future().then(lambda future: future.value()[0] * 2)
    same(doubled.wait(), torch.full((4,), 2.0 * size))
    assert work.is_completed()
    work.wait()
    same(tensor, torch.full((4,), float(size)))


def test_handles_that_nobody_waits_for(rank: int, size: int) -> None:
    """Their tensors stay where they are until the bytes have come."""
    for step in range(100):
        dist.isend(torch.full((1000,), float(step)), (rank + 1) % size)
    out = torch.zeros(1000)
    for step in range(100):
        dist.recv(out, (rank - 1) % size)
        same(out, torch.full((1000,), float(step)))


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "sparse": (lambda: dist.all_reduce(torch.eye(3).to_sparse()), "dense"),
    "no such reduction": (lambda: dist.all_reduce(torch.ones(2), Op.BAND), "BAND of torch.float32"),
    "no type": (lambda: dist.all_reduce(torch.ones(2).to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    "tag": (lambda: dist.isend(torch.ones(2), 0, tag=-1), "a tag is 0 to"),
    "splits": (lambda: dist.all_to_all_single(torch.ones(2), torch.ones(2), [1], [1]), "splits"),
    "not divisible": (lambda: dist.all_to_all_single(torch.ones(9), torch.ones(9)), "first dimension"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_told_at_once(case: str) -> None:
    call, words = BAD[case]
    with pytest.raises(Exception, match=words):
        call()
