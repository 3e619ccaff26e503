"""async_op=True: a handle now, the result when it is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import idist
from conformance.values import LAYOUTS, filled, last, of_all, raises, reduced, same, snapshot

CALLS: dict[str, Callable[..., Any]] = {
    "all_reduce": idist.all_reduce,
    "average": lambda tensor, **kwargs: idist.all_reduce(tensor, "AVERAGE", **kwargs),
    "all_reduce_": lambda tensor, **kwargs: idist.all_reduce_(snapshot(tensor), **kwargs),
    "all_gather": idist.all_gather,
    "broadcast": lambda tensor, **kwargs: idist.broadcast(tensor, src=last(), **kwargs),
    "reduce_scatter": idist.reduce_scatter,
    "all_to_all": idist.all_to_all,
    "all_gather_tensors_with_shapes": lambda tensor, **kwargs: with_shapes(tensor, **kwargs),
    "scatter": lambda tensor, **kwargs: scattered(tensor, **kwargs),
}


def with_shapes(tensor: torch.Tensor, **kwargs: Any) -> Any:
    """Rank r leaves the last r rows out."""
    lengths = [max(tensor.shape[0] - rank, 0) for rank in range(idist.get_world_size())]
    shapes = [(length, *tensor.shape[1:]) for length in lengths]
    return idist.all_gather_tensors_with_shapes(tensor[: lengths[idist.get_rank()]], shapes, **kwargs)


def scattered(tensor: torch.Tensor, **kwargs: Any) -> Any:
    values = [tensor] * idist.get_world_size() if idist.get_rank() == last() else None
    return idist.scatter(values, src=last(), **kwargs)


DERIVED = (torch.float32, torch.bool, torch.int16, torch.bfloat16, torch.complex64)
"""Types that go different ways."""


def applicable(call: str, dtype: torch.dtype) -> bool:
    return call != "average" or dtype.is_floating_point or dtype.is_complex


@pytest.mark.parametrize(("call", "dtype"), [(c, d) for c in CALLS for d in DERIVED if applicable(c, d)])
def test_same_result_as_without(call: str, dtype: torch.dtype) -> None:
    given = filled(idist.get_rank(), dtype, (4, 3))
    handle = CALLS[call](given, async_op=True)
    assert isinstance(handle, idist.Handle)
    result = handle.wait()
    assert handle.wait() is result
    same(result, CALLS[call](given))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("layout", ["transposed", "strided", "conjugated", "requires grad", "large"])
def test_layout(call: str, layout: str) -> None:
    given = LAYOUTS[layout](idist.get_rank())
    before = snapshot(given)
    result = CALLS[call](given, async_op=True).wait()
    same(result, CALLS[call](given))
    same(snapshot(given), before)


@pytest.mark.parametrize("dtype", DERIVED)
def test_gather(dtype: torch.dtype) -> None:
    """Its result is on one rank alone; the others wait for it all the same."""
    given = filled(idist.get_rank(), dtype, (4, 3))
    handle = idist.gather(given, dst=last(), async_op=True)
    assert isinstance(handle, idist.Handle)
    result, expected = handle.wait(), idist.gather(given, dst=last())
    if idist.get_rank() == last():
        same(result, expected)
    else:
        assert result is None
        assert expected is None


def test_in_place_gives_the_tensor_itself() -> None:
    for layout in ("matrix", "transposed", "strided", "parameter"):
        given = LAYOUTS[layout](idist.get_rank())
        handle = idist.all_reduce_(given, async_op=True)
        assert handle.wait() is given
        assert handle.wait() is given
        same(snapshot(given), reduced("SUM", of_all(LAYOUTS[layout])))


@pytest.mark.parametrize("order", ["as they were started", "the other way round"])
def test_several_in_flight(order: str) -> None:
    size, rank = idist.get_world_size(), idist.get_rank()
    tensors = [torch.full((1000,), float(rank + step)) for step in range(10)]
    reduced_ = [idist.all_reduce(tensor, async_op=True) for tensor in tensors]
    gathered = [idist.all_gather(tensor[:1], async_op=True) for tensor in tensors]
    handles = list(zip(range(10), reduced_, gathered, strict=True))
    for step, reduction, gathering in handles if order == "as they were started" else reversed(handles):
        same(gathering.wait(), torch.tensor([float(other + step) for other in range(size)]))
        same(reduction.wait(), torch.full((1000,), float(sum(other + step for other in range(size)))))


def test_another_collective_before_the_wait() -> None:
    handle = idist.all_reduce(torch.ones(3), async_op=True)
    same(idist.all_gather("text"), ["text"] * idist.get_world_size())
    same(idist.all_reduce(torch.ones(2)), torch.full((2,), float(idist.get_world_size())))
    same(handle.wait(), torch.full((3,), float(idist.get_world_size())))


def test_the_input_may_change_after_the_wait() -> None:
    given = torch.ones(3)
    for call in (idist.all_reduce, idist.all_gather, idist.broadcast):
        result = call(given, async_op=True).wait()
        before = result.clone()
        given.add_(1)
        same(result, before)
        given.fill_(1)


@pytest.mark.parametrize("value", [1, 1.5, True, "a", None, [torch.zeros(1)]], ids=repr)
def test_only_for_tensors(value: Any) -> None:
    with raises(idist.ConfigError, "async_op", type(value).__name__):
        idist.all_reduce(value, async_op=True)
    with raises(idist.ConfigError, "async_op", type(value).__name__):
        idist.all_gather(value, async_op=True)
    with raises(idist.ConfigError, "async_op", type(value).__name__):
        idist.broadcast(value, async_op=True)
    if idist.get_rank() == 0:
        with raises(idist.ConfigError, "async_op", type(value).__name__):
            idist.scatter([value] * idist.get_world_size(), async_op=True)
    else:
        with raises(idist.PeerFailed, "async_op"):
            idist.scatter(None, async_op=True)


def test_not_in_safe_mode() -> None:
    with raises(idist.ConfigError, "async_op"):
        idist.broadcast(torch.zeros(2), safe_mode=True, async_op=True)
