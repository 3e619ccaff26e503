"""Tensors of different shapes: all_gather(uneven=True), and all_gather_tensors_with_shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import idist
from conformance.values import DTYPES, LAYOUTS, filled, last, new, of_all, raises, same, side_by_side, snapshot

LENGTHS: dict[str, Callable[[int], int]] = {
    "equal": lambda rank: 3,
    "growing": lambda rank: rank + 1,
    "one is empty": lambda rank: 0 if rank == 0 else 2,
    "all but one are empty": lambda rank: 2 if rank == last() else 0,
    "all are empty": lambda rank: 0,
    "one is long": lambda rank: 100_000 if rank == last() else 1,
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("rest", [(), (3,), (2, 0)], ids=str)
def test_first_dimensions_differ(lengths: str, rest: tuple[int, ...]) -> None:
    """KNOWN-FAILURES 3: different shapes gave garbage, or ended a rank with SIGABRT."""
    parts = of_all(lambda rank: filled(rank, torch.float32, (LENGTHS[lengths](rank), *rest)))
    given = parts[idist.get_rank()]
    before = snapshot(given)
    result = idist.all_gather(given, uneven=True)
    same(result, side_by_side(parts))
    new(result, given, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype(dtype: torch.dtype) -> None:
    given = filled(idist.get_rank(), dtype, (idist.get_rank() + 1, 2))
    expected = side_by_side(of_all(lambda rank: filled(rank, dtype, (rank + 1, 2))))
    same(idist.all_gather(given, uneven=True), expected)


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"0-d"}))
def test_layout(layout: str) -> None:
    given = LAYOUTS[layout](idist.get_rank())
    before = snapshot(given)
    result = idist.all_gather(given, uneven=True)
    same(result, side_by_side(of_all(LAYOUTS[layout])))
    new(result, given, before)


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize(
    "other",
    [torch.zeros(2, 4), torch.zeros(2), torch.zeros(2, 3, 1), torch.zeros(2, 3, dtype=torch.float64)],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}",
)
def test_anything_else_that_differs_is_an_error_on_every_rank(other: torch.Tensor) -> None:
    """KNOWN-FAILURES 3, where nothing can be made to fit. Whether ``verify`` is on or not."""
    given = other if idist.get_rank() == last() else torch.zeros(2, 3)
    with raises(idist.CollectiveMismatch, f"rank {last()}: ", "float32 *x3", "rank 0"):
        idist.all_gather(given, uneven=True)


def test_no_first_dimension() -> None:
    with raises(idist.ConfigError, "first dimension"):
        idist.all_gather(torch.tensor(1.0), uneven=True)


@pytest.mark.ranks(at_least=2)
def test_no_first_dimension_on_one_rank_is_an_error_on_every_rank() -> None:
    if idist.get_rank() == last():
        with raises(idist.ConfigError, "first dimension"):
            idist.all_gather(torch.tensor(1.0), uneven=True)
    else:
        with raises(idist.PeerFailed, f"rank {last()}: ConfigError", "first dimension"):
            idist.all_gather(torch.zeros(2), uneven=True)


def test_uneven_is_not_asynchronous() -> None:
    with raises(idist.ConfigError, "async_op"):
        idist.all_gather(torch.zeros(2), uneven=True, async_op=True)


SHAPES: dict[str, Callable[[int], tuple[int, ...]]] = {
    "lengths": lambda rank: (rank + 1, 2),
    "last dimension": lambda rank: (2, rank + 1),
    "number of dimensions": lambda rank: (2,) * rank,
    "same size": lambda rank: (rank + 1, 12 // (rank + 1)),
    "empty": lambda rank: (rank, 3),
    "all empty": lambda rank: (0, rank),
    "equal": lambda rank: (2, 2),
}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_known_shapes(shapes: str, dtype: torch.dtype) -> None:
    parts = of_all(lambda rank: filled(rank, dtype, SHAPES[shapes](rank)))
    given = parts[idist.get_rank()]
    before = snapshot(given)
    results = idist.all_gather_tensors_with_shapes(given, of_all(SHAPES[shapes]))
    assert isinstance(results, list)
    same(results, parts)
    for result in results:
        new(result, given, before)


def test_known_shapes_of_a_transposed_parameter() -> None:
    given = torch.nn.Parameter(filled(idist.get_rank(), torch.float32, (3, 2))).t()
    shapes = of_all(lambda rank: torch.Size([2, 3]))
    results = idist.all_gather_tensors_with_shapes(given, shapes)
    same(results, of_all(lambda rank: filled(rank, torch.float32, (3, 2)).t()))
    assert not any(result.requires_grad for result in results)


def test_wrong_number_of_shapes() -> None:
    for shapes in ([], [(2,)] * (idist.get_world_size() + 1)):
        with raises(idist.ConfigError, "one shape for each", str(len(shapes))):
            idist.all_gather_tensors_with_shapes(torch.zeros(2), shapes)


def test_wrong_shape_of_this_rank() -> None:
    with raises(idist.ConfigError, "(3,)", "(2,)"):
        idist.all_gather_tensors_with_shapes(torch.zeros(2), [(3,)] * idist.get_world_size())


@pytest.mark.parametrize("value", [1, "a", None, [torch.zeros(2)]], ids=repr)
def test_known_shapes_are_for_tensors(value: Any) -> None:
    with raises(TypeError, type(value).__name__):
        idist.all_gather_tensors_with_shapes(value, [(2,)] * idist.get_world_size())
