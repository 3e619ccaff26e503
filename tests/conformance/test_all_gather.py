"""all_gather of tensors of one shape."""

from __future__ import annotations

import pytest
import torch

import idist
from conformance.values import DTYPES, LAYOUTS, filled, new, of_all, same, side_by_side, snapshot


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype(dtype: torch.dtype) -> None:
    given = filled(idist.get_rank(), dtype, (2, 3))
    result = idist.all_gather(given)
    same(result, side_by_side(of_all(filled, dtype, (2, 3))))
    new(result, given, filled(idist.get_rank(), dtype, (2, 3)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("verify", [False, True])
def test_layout(layout: str, verify: bool) -> None:
    given = LAYOUTS[layout](idist.get_rank())
    before = snapshot(given)
    result = idist.all_gather(given, verify=verify)
    same(result, side_by_side(of_all(LAYOUTS[layout])))
    new(result, given, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_dimensions_become_one(dtype: torch.dtype) -> None:
    result = idist.all_gather(filled(idist.get_rank(), dtype, ()))
    assert result.shape == (idist.get_world_size(),)
    same(result, torch.stack(of_all(filled, dtype, ())))


@pytest.mark.parametrize(("shape", "expected"), [((1,), (1,)), ((2, 3), (2, 3)), ((0,), (0,)), ((3, 0, 2), (3, 0, 2))])
def test_first_dimensions_add_up(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    result = idist.all_gather(torch.zeros(shape))
    assert result.shape == (expected[0] * idist.get_world_size(), *expected[1:])


def test_result_is_contiguous() -> None:
    assert idist.all_gather(LAYOUTS["transposed"](0)).is_contiguous()
