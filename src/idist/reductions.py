"""The reductions by name, and what they mean where a backend does not do them itself."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import reduce
from operator import add, and_, or_

import torch
from torch import Tensor

from idist.errors import ConfigError, did_you_mean

OPS = ("SUM", "PRODUCT", "MIN", "MAX", "AND", "OR", "AVERAGE")

# Of the others (uint16, float8_e4m3fn, ...) torch has no sum; what some backends have is not had everywhere.
_TYPES = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}
)

BOOLEAN = {"SUM": "MAX", "OR": "MAX", "MAX": "MAX", "PRODUCT": "MIN", "AND": "MIN", "MIN": "MIN"}
"""Truth values as 0 and 1: torch adds booleans as it ORs them, and multiplies as it ANDs."""


def check(op: str, dtype: torch.dtype) -> None:
    """Refuse what has no meaning, the same with every backend.

    Raises:
        ConfigError: an unknown reduction, or one that this type does not have.
    """
    if op not in OPS:
        raise ConfigError(f"op {op!r} is unknown; expected one of {', '.join(OPS)}.{did_you_mean(str(op), OPS)}")
    if dtype not in _TYPES:
        raise ConfigError(f"{dtype} is stored and moved, but torch does not compute with it; convert it first")
    floating = dtype.is_floating_point or dtype.is_complex
    if op in ("AND", "OR") and floating:
        raise ConfigError(f"op {op} is for integers and booleans, got {dtype}")
    if op == "AVERAGE" and not floating:
        raise ConfigError(f"op AVERAGE of {dtype} would be cut to whole numbers; convert to a float type first")
    if op in ("MIN", "MAX") and dtype.is_complex:
        raise ConfigError(f"op {op} is not defined for {dtype}: complex numbers have no order")


def of_tensors(stacked: Tensor, op: str) -> Tensor:
    """Reduce the first dimension, in the order of the ranks, keeping the type.

    Shape: ``(n, *shape)`` to ``shape``.
    """
    if op == "SUM":
        return stacked.sum(0, dtype=stacked.dtype)
    if op == "PRODUCT":
        return stacked.prod(0, dtype=stacked.dtype)
    if op == "MIN":
        return stacked.amin(0)
    if op == "MAX":
        return stacked.amax(0)
    rows: list[Tensor] = list(stacked)
    return reduce(torch.bitwise_and if op == "AND" else torch.bitwise_or, rows)


def of_numbers(values: Sequence[bool] | Sequence[int] | Sequence[float], op: str) -> bool | int | float:
    """Reduce Python numbers of one type, in the order of the ranks, exactly as Python does.

    Raises:
        ConfigError: an unknown reduction, or one that this type does not have.
    """
    kind = type(values[0])
    check(op, torch.float64 if kind is float or (kind is int and op == "AVERAGE") else torch.int64)
    if op == "AVERAGE":
        return reduce(add, values) / len(values)
    if kind is bool:
        return bool(max(values) if BOOLEAN[op] == "MAX" else min(values))
    if op == "SUM":
        return reduce(add, values)  # sum() begins with 0, which would lose the sign of -0.0
    if op == "PRODUCT":
        return math.prod(values)
    if op in ("MIN", "MAX"):
        return math.nan if any(map(math.isnan, values)) else (min if op == "MIN" else max)(values)
    return reduce(and_ if op == "AND" else or_, values)


def to_ordered(value: float, op: str) -> int:
    """A number as one of 64 bits, the largest of which stands for the result of MIN or MAX; not-a-number beats all.

    The bits of floats are in their order where they are positive, and in the reverse where negative.
    """
    key = value
    if isinstance(value, float):
        if math.isnan(value):
            value = math.copysign(math.nan, 1 if op == "MAX" else -1)
        key = _turned(struct.unpack("<q", struct.pack("<d", value))[0])
    return int(key if op == "MAX" else ~int(key))


def from_ordered(key: int, op: str, kind: type) -> bool | int | float:
    """The inverse of :func:`to_ordered`."""
    number = key if op == "MAX" else ~key
    if kind is not float:
        return bool(number) if kind is bool else number
    value: float = struct.unpack("<d", struct.pack("<q", _turned(number)))[0]
    return math.nan if math.isnan(value) else value


def _turned(bits: int) -> int:
    return bits if bits >= 0 else bits ^ (2**63 - 1)
