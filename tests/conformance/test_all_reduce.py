"""all_reduce and all_reduce_ of tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import idist
from conformance.values import DTYPES, LAYOUTS, OPS, allowed, filled, new, of_all, raises, reduced, same, snapshot

COMBINED = [(op, dtype) for op in OPS for dtype in DTYPES]


@pytest.mark.parametrize(("op", "dtype"), [pair for pair in COMBINED if allowed(*pair)])
def test_dtype(op: str, dtype: torch.dtype) -> None:
    given = filled(idist.get_rank(), dtype)
    result = idist.all_reduce(given, op)
    same(result, reduced(op, of_all(filled, dtype)))
    new(result, given, filled(idist.get_rank(), dtype))


@pytest.mark.parametrize(("op", "dtype"), [pair for pair in COMBINED if not allowed(*pair)])
def test_an_op_that_the_dtype_does_not_have_is_refused(op: str, dtype: torch.dtype) -> None:
    given = filled(idist.get_rank(), dtype)
    with raises(idist.ConfigError, op, str(dtype)):
        idist.all_reduce(given, op)
    with raises(idist.ConfigError, op, str(dtype)):
        idist.all_reduce_(given, op)
    same(given, filled(idist.get_rank(), dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("verify", [False, True])
def test_layout(layout: str, verify: bool) -> None:
    given = LAYOUTS[layout](idist.get_rank())
    before = snapshot(given)
    result = idist.all_reduce(given, verify=verify)
    same(result, reduced("SUM", of_all(LAYOUTS[layout])))
    new(result, given, before)


@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"expanded"}))
@pytest.mark.parametrize("op", ["SUM", "AVERAGE"])
def test_in_place(layout: str, op: str) -> None:
    given = LAYOUTS[layout](idist.get_rank())
    assert idist.all_reduce_(given, op) is given
    same(snapshot(given), reduced(op, of_all(LAYOUTS[layout])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_dtype(dtype: torch.dtype) -> None:
    given = filled(idist.get_rank(), dtype)
    assert idist.all_reduce_(given, "PRODUCT") is given
    same(given, reduced("PRODUCT", of_all(filled, dtype)))


def test_in_place_on_a_view_leaves_what_is_outside_of_it() -> None:
    whole = torch.full((4, 6), 1.0 + idist.get_rank())
    idist.all_reduce_(whole[::2, 1::3])
    inside = torch.zeros(4, 6, dtype=torch.bool)
    inside[::2, 1::3] = True
    total = sum(of_all(lambda rank: 1.0 + rank))
    same(whole, torch.where(inside, total, 1.0 + idist.get_rank()))


def test_in_place_on_conjugated_views() -> None:
    base = torch.tensor([1 + 2j, 3 - 1j])
    idist.all_reduce_(base.conj())
    same(base, torch.tensor([1 + 2j, 3 - 1j]) * idist.get_world_size())
    idist.all_reduce_(base.conj().imag)
    same(base.real, torch.tensor([1.0, 3.0]) * idist.get_world_size())
    same(base.imag, torch.tensor([2.0, -1.0]) * idist.get_world_size() ** 2)


def test_in_place_keeps_the_gradient_of_a_parameter() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    idist.all_reduce_(parameter, "AVERAGE")
    (parameter * 2).sum().backward()
    assert parameter.grad is not None
    idist.all_reduce_(parameter.grad)
    same(parameter.grad, torch.full((3,), 2.0 * idist.get_world_size()))


def test_default_is_sum() -> None:
    same(idist.all_reduce(torch.tensor([1.5])), torch.tensor([1.5 * idist.get_world_size()]))


@pytest.mark.parametrize("op", ["sum", "AVG", "", "MEAN", None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
def test_unknown_op(op: Any, dtype: torch.dtype) -> None:
    given = filled(idist.get_rank(), dtype)
    for reduce in (idist.all_reduce, idist.all_reduce_, idist.reduce_scatter):
        with raises(idist.ConfigError, repr(op), "SUM, PRODUCT, MIN, MAX, AND, OR, AVERAGE"):
            reduce(given[:4], op)
    with raises(idist.ConfigError, "Did you mean 'PRODUCT'?"):
        idist.all_reduce(given, "PRODUKT")


@pytest.mark.parametrize("value", [1, 1.5, "a", None, [1.0]], ids=repr)
def test_in_place_is_for_tensors(value: Any) -> None:
    with raises(TypeError, "tensor", type(value).__name__):
        idist.all_reduce_(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_ranks_have_the_same_bits(dtype: torch.dtype) -> None:
    """Whatever the order of the additions is, it is one order."""
    given = torch.rand(1000, dtype=dtype, generator=torch.Generator().manual_seed(idist.get_rank()))
    bits = idist.all_reduce(given).view(torch.uint8).numpy().tobytes()
    assert set(idist.all_gather(bits)) == {bits}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=repr)
def test_special_floats(value: float) -> None:
    result = idist.all_reduce(torch.tensor([value]))
    same(result, torch.tensor([value]))
    same(result.item(), value)
