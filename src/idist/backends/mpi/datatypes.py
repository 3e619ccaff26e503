"""Tensors and reductions as MPI knows them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import Tensor

from idist.errors import ConfigError

LARGEST_COUNT = 2**31 - 1
"""What every MPI takes as a count; MPICH takes more, Open MPI does not."""

_PIECE_BYTES = 1 << 21

Op = dist.ReduceOp

_TYPES = {
    torch.uint8: MPI.UINT8_T,
    torch.int8: MPI.INT8_T,
    torch.int16: MPI.INT16_T,
    torch.int32: MPI.INT32_T,
    torch.int64: MPI.INT64_T,
    torch.uint16: MPI.UINT16_T,
    torch.uint32: MPI.UINT32_T,
    torch.uint64: MPI.UINT64_T,
    torch.float32: MPI.FLOAT,
    torch.float64: MPI.DOUBLE,
    torch.complex64: MPI.C_FLOAT_COMPLEX,
    torch.complex128: MPI.C_DOUBLE_COMPLEX,
}
_OPS = {
    Op.SUM: MPI.SUM,
    Op.AVG: MPI.SUM,  # divided when it is there
    Op.PRODUCT: MPI.PROD,
    Op.MIN: MPI.MIN,
    Op.MAX: MPI.MAX,
    Op.BAND: MPI.BAND,
    Op.BOR: MPI.BOR,
    Op.BXOR: MPI.BXOR,
}
_BITWISE = frozenset({Op.BAND, Op.BOR, Op.BXOR})
_OF_BOOLEANS = {Op.SUM: MPI.BOR, Op.MAX: MPI.BOR, Op.PRODUCT: MPI.BAND, Op.MIN: MPI.BAND} | {
    op: _OPS[op] for op in _BITWISE
}
# No MPI has a type for bfloat16, and not all have one for float16: two bytes each, reduced by torch itself.
_HALVES = frozenset({torch.float16, torch.bfloat16})
_BY_TORCH: dict[Any, Callable[..., Tensor]] = {
    Op.SUM: torch.add,
    Op.AVG: torch.add,
    Op.PRODUCT: torch.mul,
    Op.MIN: torch.minimum,
    Op.MAX: torch.maximum,
}


def memory(tensor: Tensor) -> Any:
    """The bytes of a contiguous tensor, whatever they mean."""
    return MPI.buffer.fromaddress(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def message(tensor: Tensor, blocks: int = 1) -> list[Any]:
    """A contiguous tensor, of ``blocks`` equal parts, as mpi4py takes one to be moved as it is: it counts one part."""
    whole = memory(tensor)
    each = len(whole) // blocks
    return [whole, each, MPI.BYTE] if each <= LARGEST_COUNT else [whole, 1, _bytes(each)]


@cache
def _bytes(count: int) -> Any:
    """So many bytes as one element."""
    block = 1 << 30
    whole, rest = divmod(count, block)
    large = MPI.BYTE.Create_contiguous(block)
    kind = MPI.Datatype.Create_struct([whole, rest], [0, whole * block], [large, MPI.BYTE]).Commit()
    large.Free()
    return kind


@cache
def _two_bytes() -> Any:
    return MPI.BYTE.Create_contiguous(2).Commit()


def elements(tensor: Tensor, blocks: int = 1) -> list[Any]:
    """As :func:`message`, of a tensor that is to be reduced; a part has no more than LARGEST_COUNT elements."""
    if tensor.dtype in _HALVES:
        kind = _two_bytes()
    else:
        kind = MPI.UINT8_T if tensor.dtype is torch.bool else _TYPES[tensor.dtype]
    return [memory(tensor), tensor.numel() // blocks, kind]


def pieces(tensor: Tensor) -> Sequence[Tensor]:
    """A 1-d tensor in parts that are reduced one after the other: they stay in the cache."""
    parts: Sequence[Tensor] = tensor.split(_PIECE_BYTES // tensor.element_size())
    return parts


def reduction(op: Any, dtype: torch.dtype) -> Any:
    """MPI's operation for torch's, on this type.

    Raises:
        ConfigError: there is none.
    """
    kind = getattr(op, "op", op)
    if dtype is torch.bool:
        found = _OF_BOOLEANS.get(kind)
    elif dtype in _HALVES:
        found = _by_torch(kind, dtype) if kind in _BY_TORCH else None
    elif dtype not in _TYPES or (kind in _BITWISE and (dtype.is_floating_point or dtype.is_complex)):
        found = None
    else:
        found = None if dtype.is_complex and kind in (Op.MIN, Op.MAX) else _OPS.get(kind)
    if found is None:
        raise ConfigError(f"{str(kind).rpartition('.')[2]} of {dtype} is not a reduction that MPI has")
    return found


@cache
def _by_torch(kind: Any, dtype: torch.dtype) -> Any:
    combine = _BY_TORCH[kind]

    def reduce(theirs: Any, ours: Any, datatype: Any) -> None:
        if len(ours):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that theirs cannot be written, which nobody does
                incoming = torch.frombuffer(theirs, dtype=dtype)
            result = torch.frombuffer(ours, dtype=dtype)
            combine(incoming, result, out=result)

    return MPI.Op.Create(reduce, commute=True)
