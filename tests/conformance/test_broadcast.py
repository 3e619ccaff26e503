"""broadcast of tensors; see test_numbers.py and test_objects.py for the rest."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

import idist
from conformance.values import DTYPES, LAYOUTS, filled, last, new, raises, received, same, snapshot


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_every_rank(dtype: torch.dtype) -> None:
    for source in range(idist.get_world_size()):
        given = filled(idist.get_rank(), dtype, (2, 3))
        result = idist.broadcast(given, src=source)
        same(result, filled(source, dtype, (2, 3)))
        new(result, given, filled(idist.get_rank(), dtype, (2, 3)))


def test_default_source_is_rank_0() -> None:
    same(idist.broadcast(torch.tensor([idist.get_rank()])), torch.tensor([0]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("verify", [False, True])
def test_layout(layout: str, verify: bool) -> None:
    given = LAYOUTS[layout](idist.get_rank())
    before = snapshot(given)
    result = idist.broadcast(given, src=last(), verify=verify)
    same(result, snapshot(LAYOUTS[layout](last())))
    new(result, given, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_safe_mode_announces_what_comes(layout: str) -> None:
    given = LAYOUTS[layout](last())
    before = snapshot(given)
    if idist.get_rank() == last():
        result = idist.broadcast(given, src=last(), safe_mode=True)
        same(result, before)
        new(result, given, before)
    else:
        result = idist.broadcast(None, src=last(), safe_mode=True)
        same(result, received(before))
        assert not result.requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_safe_mode_dtype(dtype: torch.dtype) -> None:
    given = filled(0, dtype, (2, 3))
    if idist.get_rank() == 0:
        same(idist.broadcast(given, safe_mode=True), given)
    else:
        same(idist.broadcast(None, safe_mode=True), received(given))


@pytest.mark.parametrize("value", [torch.arange(3.0), 2**53 + 1, 0.1, True, "é", None, {"a": [1]}], ids=repr)
def test_safe_mode_takes_anything_from_the_other_ranks(value: Any) -> None:
    for passed in (None, 1, "text", [1, 2], torch.zeros(7), torch.zeros(2, dtype=torch.int16)):
        mine = value if idist.get_rank() == last() else passed
        result = idist.broadcast(mine, src=last(), safe_mode=True)
        same(result, value if isinstance(mine, torch.Tensor) else received(value))


@pytest.mark.parametrize("passed", [None, 1, "text"], ids=repr)
def test_safe_mode_tensor_goes_to_the_device_of_the_context(passed: Any) -> None:
    given = torch.ones(2, device=idist.device()) if idist.get_rank() == last() else passed
    assert idist.broadcast(given, src=last(), safe_mode=True).device == idist.device()


@pytest.mark.parametrize("source", [-1, 100, None, "0", 0.0, True, [0]], ids=repr)
def test_bad_source(source: Any) -> None:
    for value, safe_mode in product([torch.zeros(2), 1, "a", None], [False, True]):
        with raises(idist.ConfigError, "src", repr(source)):
            idist.broadcast(value, src=source, safe_mode=safe_mode)
