"""reduce_scatter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import idist
from conformance.values import (
    DTYPES,
    LAYOUTS,
    OPS,
    SPLITTABLE,
    allowed,
    filled,
    my_part,
    new,
    of_all,
    raises,
    reduced,
    same,
    snapshot,
)  # fmt: skip

COMBINED = [(op, dtype) for op in OPS for dtype in DTYPES]


@pytest.mark.parametrize(("op", "dtype"), [pair for pair in COMBINED if allowed(*pair)])
def test_dtype(op: str, dtype: torch.dtype) -> None:
    shape = (2 * idist.get_world_size(), 3)
    given = filled(idist.get_rank(), dtype, shape)
    result = idist.reduce_scatter(given, op)
    assert result.shape == (2, 3)
    same(result, my_part(reduced(op, of_all(filled, dtype, shape))))
    new(result, given, filled(idist.get_rank(), dtype, shape))


@pytest.mark.parametrize(("op", "dtype"), [pair for pair in COMBINED if not allowed(*pair)])
def test_an_op_that_the_dtype_does_not_have_is_refused(op: str, dtype: torch.dtype) -> None:
    with raises(idist.ConfigError, op, str(dtype)):
        idist.reduce_scatter(filled(0, dtype, (4,)), op)


@pytest.mark.parametrize("layout", SPLITTABLE)
@pytest.mark.parametrize("verify", [False, True])
def test_layout(layout: str, verify: bool) -> None:
    given = LAYOUTS[layout](idist.get_rank())
    before = snapshot(given)
    result = idist.reduce_scatter(given, verify=verify)
    same(result, my_part(reduced("SUM", of_all(LAYOUTS[layout]))))
    new(result, given, before)


def test_empty() -> None:
    same(idist.reduce_scatter(torch.empty(0)), torch.empty(0))


@pytest.mark.ranks(at_least=2)
def test_first_dimension_must_be_a_multiple() -> None:
    with raises(idist.ConfigError, "first dimension", f"{idist.get_world_size()} ranks", "(9, 4)"):
        idist.reduce_scatter(torch.zeros(9, 4))


def test_no_first_dimension() -> None:
    with raises(idist.ConfigError, "first dimension", "()"):
        idist.reduce_scatter(torch.tensor(1.0))


@pytest.mark.parametrize("value", [1, "a", None, [1, 2]], ids=repr)
def test_only_tensors(value: Any) -> None:
    with raises(TypeError, type(value).__name__):
        idist.reduce_scatter(value)
