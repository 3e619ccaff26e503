"""What the tests send, and what they compare it with."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import pytest
import torch
from torch import Tensor

import idist

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
DTYPES = (torch.bool, *INTEGERS, *FLOATS, torch.complex64)
OPS = ("SUM", "PRODUCT", "MIN", "MAX", "AND", "OR", "AVERAGE")

PROMPT_S = 5.0
"""An error that travels is there sooner; one that only a timeout brings is not."""

LAYOUTS: dict[str, Callable[[int], Tensor]] = {
    "0-d": lambda rank: torch.tensor(3.0 + rank),
    "one element": lambda rank: torch.tensor([3.0 + rank]),
    "empty": lambda rank: torch.empty(0),
    "empty rows": lambda rank: torch.empty(4, 0, 3),
    "matrix": lambda rank: _steps(12, rank).view(4, 3),
    "transposed": lambda rank: _steps(12, rank).view(3, 4).t(),
    "strided": lambda rank: _steps(48, rank).view(8, 6)[::2, 1::3],
    "offset": lambda rank: _steps(12, rank)[4:],
    "channels last": lambda rank: _steps(96, rank).view(4, 3, 2, 4).contiguous(memory_format=torch.channels_last),
    "expanded": lambda rank: _steps(3, rank).expand(4, 3),
    "large": lambda rank: _steps(2**20, rank),
    "conjugated": lambda rank: torch.tensor([1 + 2j, 3 - 1j, rank * 1j, rank]).conj(),
    "negated": lambda rank: torch.tensor([1 + 2j, 3 - 1j, rank * 1j, rank]).conj().imag,
    "requires grad": lambda rank: _steps(12, rank).view(4, 3).requires_grad_(),
    "computed": lambda rank: _steps(12, rank).view(4, 3).requires_grad_() * 2,
    "parameter": lambda rank: torch.nn.Parameter(_steps(4, rank)),
}
"""A rank's tensor as users have them, by what is special about it."""

SPLITTABLE = sorted(LAYOUTS.keys() - {"0-d", "one element", "empty"})
"""Those whose first dimension can be split over four ranks."""


def _steps(length: int, rank: int) -> Tensor:
    return torch.arange(float(length)) + 100 * rank


def allowed(op: str, dtype: torch.dtype) -> bool:
    """Whether a tensor of this type has this reduction."""
    if op == "AVERAGE":
        return dtype.is_floating_point or dtype.is_complex
    if op in ("AND", "OR"):
        return dtype in INTEGERS or dtype is torch.bool
    return op in ("SUM", "PRODUCT") or not dtype.is_complex


def filled(rank: int, dtype: torch.dtype, shape: Sequence[int] = (5,)) -> Tensor:
    """Different on every rank, and small: every reduction over four ranks is exact in every type."""
    places = torch.arange(torch.Size(shape).numel())
    small = (places + 2 * rank) % 3 + 1
    if dtype is torch.bool:
        small = small == 1
    elif dtype.is_complex:
        small = small + 1j * ((places + rank) % 2)
    elif dtype.is_signed:
        small = torch.where(places % 4 == 3, -small, small)
    return small.to(dtype).view(shape)


def reduced(op: str, parts: Sequence[Tensor]) -> Tensor:
    """The reduction, by definition."""
    dtype = parts[0].dtype
    if dtype is torch.bool:
        op = {"SUM": "OR", "MAX": "OR", "PRODUCT": "AND", "MIN": "AND"}.get(op, op)
    wide = torch.complex128 if dtype.is_complex else torch.float64 if dtype.is_floating_point else dtype
    steps: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "SUM": torch.add, "AVERAGE": torch.add, "PRODUCT": torch.mul, "MIN": torch.minimum, "MAX": torch.maximum,
        "AND": torch.bitwise_and, "OR": torch.bitwise_or,
    }  # fmt: skip
    result = reduce(steps[op], [snapshot(part).to(wide) for part in parts])
    return (result / len(parts) if op == "AVERAGE" else result).to(dtype)


def received(tensor: Any) -> Any:
    """As a rank gets it that has passed no tensor of its own: on the device of the backend."""
    return tensor.to(idist.device()) if isinstance(tensor, Tensor) else tensor


def side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """What a gather of these makes, by definition."""
    return torch.cat([snapshot(part).reshape(1) if part.ndim == 0 else snapshot(part) for part in parts])


def of_all(make: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """``make(rank, ...)`` for every rank, which every rank can know by itself."""
    return [make(rank, *args, **kwargs) for rank in range(idist.get_world_size())]


def my_part(whole: Tensor) -> Tensor:
    """This rank's part of the first dimension."""
    return whole.tensor_split(idist.get_world_size())[idist.get_rank()]


def last() -> int:
    """The last rank; the only one, in a world of one."""
    return idist.get_world_size() - 1


def same(actual: Any, expected: Any) -> None:
    """Same type, same value: tensors to the last bit of value, dtype, device and shape, floats to the sign of zero."""
    assert type(actual) is type(expected), f"got {actual!r}, a {type(actual)}, expected {expected!r}"
    if isinstance(expected, Tensor):
        assert actual.device == expected.device, f"got a tensor on {actual.device}, expected one on {expected.device}"
        # On the CPU, as not every device compares every type.
        torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), f"got {actual!r}, expected {expected!r}"
        for ours, theirs in zip(actual, expected, strict=True):
            same(ours, theirs)
    elif isinstance(expected, float):
        bits = [struct.pack("<d", number) for number in (actual, expected)]
        assert bits[0] == bits[1] or (actual != actual and expected != expected), f"got {actual!r}, not {expected!r}"
    else:
        assert actual == expected, f"got {actual!r:.500}, expected {expected!r:.500}"


def new(result: Tensor, given: Tensor, before: Tensor) -> None:
    """``result`` is no part of ``given``, which is as it was, nor of the graph that made it."""
    assert result is not given
    assert not result.requires_grad, "the result is part of the graph"
    assert result.device == given.device
    if result.numel() and given.numel():
        theirs = given.untyped_storage().data_ptr()
        assert result.untyped_storage().data_ptr() != theirs, "the result shares memory with what was given"
    same(snapshot(given), before)


def snapshot(tensor: Tensor) -> Tensor:
    """The values now, whatever happens to the tensor."""
    return tensor.detach().resolve_conj().resolve_neg().clone()


@contextmanager
def raises(kind: type[BaseException], *words: str) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """Exactly this kind of error, with all these words, and at once."""
    start = time.monotonic()
    with pytest.raises(kind) as caught:
        yield caught
    seconds = time.monotonic() - start
    assert caught.type is kind, f"{caught.type} instead of {kind}"
    assert seconds < PROMPT_S, f"the error took {seconds:.1f} s"
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
