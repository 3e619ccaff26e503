"""all_to_all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import idist
from conformance.values import (
    DTYPES,
    LAYOUTS,
    SPLITTABLE,
    filled,
    my_part,
    new,
    of_all,
    raises,
    same,
    side_by_side,
    snapshot,
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype(dtype: torch.dtype) -> None:
    shape = (2 * idist.get_world_size(), 3)
    given = filled(idist.get_rank(), dtype, shape)
    result = idist.all_to_all(given)
    same(result, side_by_side([my_part(part) for part in of_all(filled, dtype, shape)]))
    new(result, given, filled(idist.get_rank(), dtype, shape))


@pytest.mark.parametrize("layout", SPLITTABLE)
@pytest.mark.parametrize("verify", [False, True])
def test_layout(layout: str, verify: bool) -> None:
    given = LAYOUTS[layout](idist.get_rank())
    before = snapshot(given)
    result = idist.all_to_all(given, verify=verify)
    same(result, side_by_side([my_part(snapshot(part)) for part in of_all(LAYOUTS[layout])]))
    new(result, given, before)


def test_twice_is_where_it_began() -> None:
    given = filled(idist.get_rank(), torch.float32, (3 * idist.get_world_size(), 2))
    same(idist.all_to_all(idist.all_to_all(given)), given)


def test_empty() -> None:
    same(idist.all_to_all(torch.empty(0)), torch.empty(0))


@pytest.mark.ranks(at_least=2)
def test_first_dimension_must_be_a_multiple() -> None:
    with raises(idist.ConfigError, "first dimension", f"{idist.get_world_size()} ranks", "(9, 4)"):
        idist.all_to_all(torch.zeros(9, 4))


def test_no_first_dimension() -> None:
    with raises(idist.ConfigError, "first dimension", "()"):
        idist.all_to_all(torch.tensor(1.0))


@pytest.mark.parametrize("value", [1, "a", None, [1, 2]], ids=repr)
def test_only_tensors(value: Any) -> None:
    with raises(TypeError, type(value).__name__):
        idist.all_to_all(value)
