"""gather of tensors; see test_numbers.py and test_objects.py for the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import idist
from conformance.values import DTYPES, LAYOUTS, filled, last, new, of_all, raises, same, side_by_side, snapshot


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_to_every_rank(dtype: torch.dtype) -> None:
    for destination in range(idist.get_world_size()):
        given = filled(idist.get_rank(), dtype, (2, 3))
        result = idist.gather(given, dst=destination)
        if idist.get_rank() == destination:
            same(result, side_by_side(of_all(filled, dtype, (2, 3))))
            new(result, given, filled(idist.get_rank(), dtype, (2, 3)))
        else:
            assert result is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("verify", [False, True])
def test_layout(layout: str, verify: bool) -> None:
    given = LAYOUTS[layout](idist.get_rank())
    before = snapshot(given)
    result = idist.gather(given, dst=last(), verify=verify)
    same(snapshot(given), before)
    same(result, side_by_side(of_all(LAYOUTS[layout])) if idist.get_rank() == last() else None)


def test_zero_dimensions_become_one() -> None:
    result = idist.gather(torch.tensor(idist.get_rank()))
    same(result, torch.arange(idist.get_world_size()) if idist.get_rank() == 0 else None)


@pytest.mark.parametrize("destination", [-1, 100, None, "0", 0.0, True, [0]], ids=repr)
def test_bad_destination(destination: Any) -> None:
    for value in (torch.zeros(2), 1, "a", None):
        with raises(idist.ConfigError, "dst", repr(destination)):
            idist.gather(value, dst=destination)
