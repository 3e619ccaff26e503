"""The public collectives, derived once from a backend's primitives.

A tensor goes as it is. A Python number, string, path or other object goes in a frame (see
``idist/wire.py``) and comes back with its own type and value. What a rank that is not a member of
``group`` passes comes back to it unchanged; only :func:`idist.gather` gives it None, as to all but one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from idist import reductions, wire
from idist.backends.base import DONE, Group, Work
from idist.errors import CollectiveMismatch, ConfigError, PeerFailed
from idist.groups import resolve
from idist.runtime import Context, current, explain, wait_for
from idist.wire import Call, Kind, Message

__all__ = [
    "Handle",
    "all_gather",
    "all_gather_tensors_with_shapes",
    "all_reduce",
    "all_reduce_",
    "all_to_all",
    "barrier",
    "broadcast",
    "gather",
    "reduce_mean",
    "reduce_scatter",
    "scatter",
]

N = TypeVar("N", bool, int, float)


class Handle:
    """A tensor operation under way, from ``async_op=True``."""

    __slots__ = ("_finish", "_result", "_work")

    def __init__(self, work: Work, finish: Callable[[], Any]) -> None:
        self._work: Work | None = work
        self._finish = finish
        self._result: Any = None

    def wait(self) -> Any:
        """The result, when it is there; the same again at a second call.

        Raises:
            RuntimeError: what the backend says of a peer that died or a timeout that passed.
        """
        if self._work is not None:
            try:
                self._work.wait()
            except RuntimeError as error:
                explain(error)  # with the report of the hang, if there is one
                raise
            self._result = self._finish()
            self._work = None
        return self._result


@overload
def all_reduce(value: N, op: str = "SUM", group: Any = None, *, verify: bool | None = None) -> N: ...
@overload
def all_reduce(value: Tensor, op: str = "SUM", group: Any = None, *, verify: bool | None = None) -> Tensor: ...
@overload
def all_reduce(
    value: Tensor, op: str = "SUM", group: Any = None, *, async_op: bool, verify: bool | None = None
) -> Any: ...
def all_reduce(
    value: Any, op: str = "SUM", group: Any = None, *, async_op: bool = False, verify: bool | None = None
) -> Any:
    """Reduce a tensor or a number over the ranks; all get the result, the input stays as it is.

    Args:
        value: a tensor of any type, or a bool, int or float (a NumPy scalar counts as one).
        op: SUM, PRODUCT, MIN, MAX, AND, OR or AVERAGE. Booleans add as OR and multiply as AND.
            AVERAGE is for floats, and for Python ints, whose average is a float.
        group: ranks, or what :func:`new_group` returned; default: all ranks.
        async_op: return a :class:`Handle` at once; tensors only.
        verify: check first that the ranks agree on the tensor and ``op``; default: the context's.

    Returns:
        A new tensor, detached from autograd, on the device of the input; or a number, where ints are
        exact, floats are doubles, reduced in the order of the ranks and so the same on all.

    Shape: that of ``value``.

    Raises:
        ConfigError: a bad ``op`` or ``group``.
        TypeError: neither a tensor nor a number.
        CollectiveMismatch: the ranks disagree (numbers always; where one passes a tensor, with ``verify``).
        PeerFailed: another rank gave a value that cannot be reduced.

    Cost: one all_reduce; one all_gather of 256 bytes for a number, for a type that the backend
    does not reduce one of the tensor, and one more of 256 bytes to verify. Among more than 64 ranks, for a number one
    all_reduce of 344 bytes, and a second one of at most 16 unless ``op`` is MIN or MAX; only the product of numbers,
    and their AND and OR where the backend has none, are gathered then too.
    """
    context, members = _enter(group)
    if not isinstance(value, Tensor):
        _tensors_only(async_op, value)
        return _all_reduce_number(context, members, value, op)
    if _is_plain(context, members, value, op, verify):
        return _reduced(context, members, value.clone(), op, async_op)
    result = value.detach().clone(memory_format=torch.contiguous_format) if members.index >= 0 else value
    return _answer(_start_all_reduce(context, members, result, op, verify), async_op)


def all_reduce_(
    tensor: Tensor, op: str = "SUM", group: Any = None, *, async_op: bool = False, verify: bool | None = None
) -> Any:
    """:func:`all_reduce` in place: returns ``tensor``, or a :class:`Handle` whose ``wait()`` does.

    Raises:
        TypeError: not a tensor; and as :func:`all_reduce`.

    Shape, cost: those of :func:`all_reduce`.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"all_reduce_ works in place, so on tensors only, got {type(tensor).__name__}; use all_reduce")
    context, members = _enter(group)
    if _is_plain(context, members, tensor, op, verify):
        return _reduced(context, members, tensor, op, async_op)
    return _answer(_start_all_reduce(context, members, tensor.detach(), op, verify, returns=tensor), async_op)


@overload
def reduce_mean(total: float, count: int, group: Any = None) -> float: ...
@overload
def reduce_mean(total: Tensor, count: int, group: Any = None) -> Tensor: ...
def reduce_mean(total: Any, count: int, group: Any = None) -> Any:
    """The mean over the samples of all ranks, however many each has: the sum of the totals by that of the counts.

    An average of the ranks' own averages is another number where ranks have different numbers of samples. A rank
    without any passes 0 for both, or zeros of the shape that the others have.

    Args:
        total: of this rank's samples; a number, or a tensor of them, of one shape on all ranks.
        count: this rank's samples.
        group: ranks, or what :func:`new_group` returned; default: all ranks.

    Returns:
        A float, or a tensor of float64 on the device of ``total``. Integers are summed exactly, floats as doubles in
        the order of the ranks, and then divided once: a count of right answers gives the same mean on any number of
        ranks.

    Shape: that of ``total``.

    Raises:
        TypeError: ``total`` is neither a tensor nor a number, or ``count`` not an integer.
        ZeroDivisionError: no rank has any sample.
        CollectiveMismatch, PeerFailed: as :func:`all_reduce`.

    Cost: those of two :func:`all_reduce`.
    """
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"count must be the number of this rank's samples, an integer, got {count!r}")
    if isinstance(total, Tensor):
        exact = torch.float64 if total.is_floating_point() else torch.int64
        total = all_reduce(total.to(exact), "SUM", group)
    else:
        total = all_reduce(total, "SUM", group)
    samples = all_reduce(count, "SUM", group)
    if samples == 0:
        raise ZeroDivisionError("the mean of no samples: count is 0 on every rank")
    # Not as it is: torch would divide int64 as float32.
    return total.double() / samples if isinstance(total, Tensor) else total / samples


@overload
def all_gather(value: Tensor, group: Any = None, *, uneven: bool = False, verify: bool | None = None) -> Tensor: ...
@overload
def all_gather(
    value: Any, group: Any = None, *, async_op: bool = False, uneven: bool = False, verify: bool | None = None
) -> Any: ...
def all_gather(
    value: Any, group: Any = None, *, async_op: bool = False, uneven: bool = False, verify: bool | None = None
) -> Any:
    """Every rank's value, on every rank, in the order of the ranks.

    Args:
        value: a tensor, a number, a string, a path, or any object that pickle takes.
        group: ranks, or what :func:`new_group` returned; default: all ranks.
        async_op: return a :class:`Handle` at once; tensors of equal shape only.
        uneven: the first dimensions may differ; they are exchanged first.
        verify: check first that the tensors fit together; default: the context's.

    Returns:
        One tensor for tensors, on the device of the input; a list otherwise.

    Shape: ``(d, *rest)`` to ``(world_size * d, *rest)``; ``()`` to ``(world_size,)``; with
    ``uneven`` to ``(sum of all d, *rest)``.

    Raises:
        CollectiveMismatch: the ranks disagree on the kind of value, with ``uneven`` on anything
            but the first dimension, with ``verify`` on shape or dtype.
        PeerFailed: another rank gave an object that cannot be pickled.
        TypeError, pickle.PicklingError, ...: this rank did.

    Cost: one all_gather for a tensor, and one more of 256 bytes with ``uneven`` or ``verify``; for the
    rest one of 256 bytes, and a second one of the longest payload if that is over 240.
    Objects are pickled: for ranks that trust each other.
    """
    context, members = _enter(group)
    if isinstance(value, Tensor):
        if uneven:
            _tensors_only(async_op, "tensors of different lengths")
            return _all_gather_uneven(context, members, value)
        return _answer(_start_all_gather(context, members, value, verify), async_op)
    _tensors_only(async_op, value)
    if members.index < 0:
        return value
    messages = _exchange_value(context, members, Call.ALL_GATHER, value)
    return [wire.decode(message.payload, message.kind) for message in messages]


def all_gather_tensors_with_shapes(
    tensor: Tensor, shapes: Sequence[Sequence[int]], group: Any = None, *, async_op: bool = False
) -> Any:
    """Every rank's tensor, where the shapes differ and every rank knows them all.

    Args:
        tensor: of the shape that ``shapes`` gives for this rank.
        shapes: one per rank of the group.
        async_op: return a :class:`Handle` at once.

    Returns:
        A list of one tensor per rank of the group, in the order of the ranks.

    Raises:
        TypeError: not a tensor.
        ConfigError: the number of shapes is not the number of ranks, or this rank's is another.
        CollectiveMismatch: the ranks disagree on the shapes or the dtype, where the context verifies.

    Cost: one all_gather of the largest tensor; where the context verifies, one of 256 bytes.
    """
    context, members = _enter(group)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"all_gather_tensors_with_shapes takes a tensor, got {type(tensor).__name__}")
    if members.index < 0:
        return _answer(Handle(DONE, lambda: [tensor]), async_op)
    sizes = [torch.Size(shape) for shape in shapes]
    if len(sizes) != members.size:
        raise ConfigError(f"expected one shape for each of {members.size} ranks, got {len(sizes)}")
    if sizes[members.index] != tensor.shape:
        raise ConfigError(
            f"shapes give {tuple(sizes[members.index])} for this rank, its tensor is {tuple(tensor.shape)}"
        )
    if context.verify:
        told = _described(tensor.dtype, [" and ".join("x".join(map(str, size)) for size in sizes)])
        _exchange_tensor(context, members, Message(Call.WITH_SHAPES, Kind.TENSOR, told))
    return _answer(_start_all_gather_sizes(context, members, tensor, sizes), async_op)


def broadcast(
    value: Any,
    src: int = 0,
    safe_mode: bool = False,
    group: Any = None,
    *,
    async_op: bool = False,
    verify: bool | None = None,
) -> Any:
    """Rank ``src``'s value, on every rank.

    Args:
        value: a tensor, a number, a string, a path, or any object that pickle takes. For a tensor
            the other ranks pass one of the same shape and dtype (or use ``safe_mode``: with None they
            would wait for what does not come, unless the context verifies); for all else they may pass None.
        src: the global rank that has the value.
        safe_mode: the other ranks may pass anything, also for a tensor: what comes is announced first.
        group: ranks, or what :func:`new_group` returned; default: all ranks.
        async_op: return a :class:`Handle` at once; tensors without ``safe_mode`` only.
        verify: check first that the tensors fit together; default: the context's.

    Returns:
        The value with its type; a new tensor, on the device of the tensor that was passed.

    Raises:
        ConfigError: ``src`` is not a rank of the group.
        CollectiveMismatch: a rank passed another kind of value, or a tensor that does not fit, under verify.
        PeerFailed: rank ``src``'s object cannot be pickled.

    Cost: one broadcast for a tensor, and one all_gather of 256 bytes with ``safe_mode`` or ``verify``;
    for the rest the latter alone, and a broadcast of the rest of a payload of over 240 bytes.
    """
    context, members = _enter(group)
    _check_root(src, members, "src")
    if isinstance(value, Tensor) and not safe_mode:
        if members.index < 0:
            return _answer(Handle(DONE, lambda: value), async_op)
        return _answer(_start_broadcast(context, members, value, src, verify), async_op)
    _tensors_only(async_op, value)
    if members.index < 0:
        return value
    return _broadcast_value(context, members, value, src, safe_mode)


def gather(value: Any, dst: int = 0, group: Any = None, *, async_op: bool = False, verify: bool | None = None) -> Any:
    """Every rank's value, on rank ``dst`` alone.

    Args and errors: as :func:`all_gather`, and ``dst`` is a global rank of the group.

    Returns:
        As :func:`all_gather` on rank ``dst``, None on the others.

    Shape: ``(d, *rest)`` to ``(world_size * d, *rest)``; ``()`` to ``(world_size,)``.

    Cost: one gather for a tensor; for the rest one all_gather of 256 bytes, and a gather of the longest
    payload if that is over 240.
    """
    context, members = _enter(group)
    _check_root(dst, members, "dst")
    if isinstance(value, Tensor):
        return _answer(_start_gather(context, members, value, dst, verify), async_op)
    _tensors_only(async_op, value)
    if members.index < 0:
        return None
    messages = _exchange_value(context, members, Call.GATHER, value, root=dst, to=dst)
    return [wire.decode(m.payload, m.kind) for m in messages] if context.rank == dst else None


def scatter(values: Sequence[Any] | None, src: int = 0, group: Any = None, *, async_op: bool = False) -> Any:
    """One of rank ``src``'s values for each rank.

    Args:
        values: on rank ``src`` one value per rank of the group, all tensors of one shape and dtype, or
            none of them a tensor; ignored on the others.
        src: the global rank that has the values.
        async_op: return a :class:`Handle` when it is known what comes; tensors only.

    Returns:
        This rank's value; a tensor is new, and on the device of the source's kind.

    Raises:
        ConfigError: ``src`` is not a rank of the group, or the number of values is not its size.
        PeerFailed: on the other ranks, if rank ``src``'s values are not right.

    Cost: one all_gather of 256 bytes and one scatter.
    """
    context, members = _enter(group)
    _check_root(src, members, "src")
    if members.index < 0:
        return _answer(Handle(DONE, lambda: values), async_op)
    return _answer(_start_scatter(context, members, values, src, async_op), async_op)


def reduce_scatter(
    tensor: Tensor, op: str = "SUM", group: Any = None, *, async_op: bool = False, verify: bool | None = None
) -> Any:
    """Reduce a tensor over the ranks; rank i of n gets the i-th of n equal parts of the first dimension.

    Args:
        tensor: of one shape and type on all ranks.
        op: as of :func:`all_reduce`.
        group: ranks, or what :func:`new_group` returned; default: all ranks.
        async_op: return a :class:`Handle` at once.
        verify: check first that the ranks agree; default: the context's.

    Returns:
        A new tensor, detached from autograd, on the device of the input.

    Shape: ``(world_size * d, *rest)`` to ``(d, *rest)``.

    Raises:
        TypeError: not a tensor.
        ConfigError: the first dimension is no multiple of the number of ranks; a bad ``op`` or ``group``.

    Cost: one reduce_scatter, or one all_reduce where the backend has none for this type.
    """
    context, members = _enter(group)
    with _checking(context, members, Call.REDUCE_SCATTER, verify):
        rows = _rows(tensor, members, "reduce_scatter")
        _check_op(op, tensor.dtype)
    if members.index < 0:
        return _answer(Handle(DONE, lambda: tensor), async_op)
    _verify(context, members, Call.REDUCE_SCATTER, tensor, verify, op=op)
    wire_op = "SUM" if op == "AVERAGE" else op
    if not context.backend.reduces(wire_op, tensor.dtype):
        whole = _start_all_reduce(context, members, tensor.detach().clone(), op, verify=False)
        return _answer(Handle(DONE, lambda: whole.wait().narrow(0, members.index * rows, rows).clone()), async_op)
    staged = _staged(context, tensor)
    out = staged.new_empty(rows, *tensor.shape[1:])
    work = context.backend.reduce_scatter_into(out.view(-1), staged.view(-1), wire_op, members)

    def finish() -> Tensor:
        return (out.div_(members.size) if op == "AVERAGE" else out).to(tensor.device)

    return _answer(Handle(work, finish), async_op)


def all_to_all(tensor: Tensor, group: Any = None, *, async_op: bool = False, verify: bool | None = None) -> Any:
    """Of n equal parts of the first dimension send the i-th to rank i; get one from each, by rank.

    Args:
        tensor: of one shape and type on all ranks.
        group: ranks, or what :func:`new_group` returned; default: all ranks.
        async_op: return a :class:`Handle` at once.
        verify: check first that the ranks agree; default: the context's.

    Returns:
        A new tensor, detached from autograd, on the device of the input.

    Shape: ``(world_size * d, *rest)`` to the same.

    Raises:
        TypeError: not a tensor.
        ConfigError: the first dimension is no multiple of the number of ranks; a bad ``group``.

    Cost: one all_to_all.
    """
    context, members = _enter(group)
    with _checking(context, members, Call.ALL_TO_ALL, verify):
        _rows(tensor, members, "all_to_all")
    if members.index < 0:
        return _answer(Handle(DONE, lambda: tensor), async_op)
    _verify(context, members, Call.ALL_TO_ALL, tensor, verify)
    staged = _staged(context, tensor)
    out = torch.empty_like(staged)
    work = context.backend.all_to_all_into(out.view(-1), staged.view(-1), members)
    return _answer(Handle(work, lambda: out.to(tensor.device)), async_op)


def barrier(group: Any = None) -> None:
    """Return when every rank has come here.

    Raises:
        CollectiveMismatch: another rank is in another collective, where the context verifies.

    Cost: one barrier; where the context verifies, one all_gather of 256 bytes.
    """
    context, members = _enter(group)
    if members.index < 0:
        return
    if context.verify:
        wire.agree(context, members, Message(Call.BARRIER, Kind.ABSENT))
    try:
        context.backend.barrier(members)
    except RuntimeError as error:
        explain(error)
        raise


def outcome(context: Context, group: Group, src: int, failure: str | None) -> str | None:
    """Rank ``src`` says whether what it did alone succeeded: None, or what went wrong. For :mod:`idist.ranks`.

    Cost: one all_gather of 256 bytes; a longer message is cut.
    """
    payload = wire.words(failure or "")
    message = Message(Call.OUTCOME, Kind.STR, payload if context.rank == src else b"", root=src)
    said = wire.hear(context, group, message, src).message.payload
    return said.decode(errors="ignore") or None


@contextmanager
def together(context: Context, call: Call) -> Iterator[None]:
    """A part of ``call`` that each rank does by itself and that may fail on some: then none goes on.

    Raises:
        PeerFailed: the block raised on another rank; there its own error is raised.

    Cost: one all_gather of 256 bytes.
    """
    with _telling(context, context.everyone, call):
        yield
    wire.agree(context, context.everyone, Message(call, Kind.ABSENT))


# Tensors


def _enter(group: Any) -> tuple[Context, Group]:
    context = current()
    return context, resolve(context, group)


def _answer(handle: Handle, async_op: bool) -> Any:
    return handle if async_op else handle.wait()


def _staged(context: Context, tensor: Tensor) -> Tensor:
    """What a primitive takes: detached, contiguous, on the backend's device; not a copy if it is so already.

    A conjugated or negated view is made real: only torch knows that its memory says something else.
    """
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.to(context.backend.device_for(tensor)).contiguous()


def _is_plain(context: Context, group: Group, tensor: Tensor, op: str, verify: bool | None) -> bool:
    """Whether the backend reduces this very tensor: nothing to verify, to convert, to move or to derive."""
    if verify or (context.verify and verify is None) or group.index < 0 or type(op) is not str:
        return False
    native = context.native.get((op, tensor.dtype))
    if native is None:
        native = context.native[op, tensor.dtype] = _is_native(context, op, tensor.dtype)
    return (
        native
        and type(tensor) is Tensor
        and not tensor.requires_grad
        and tensor.device == context.backend.device()
        and tensor.is_contiguous()
        and not tensor.is_neg()
    )


def _reduced(context: Context, group: Group, tensor: Tensor, op: str, async_op: bool) -> Any:
    """A tensor that is plain, in place."""
    work = context.backend.all_reduce_(tensor, op, group)
    if async_op:
        return Handle(work, lambda: tensor)
    wait_for(work)
    return tensor


def _is_native(context: Context, op: str, dtype: torch.dtype) -> bool:
    with suppress(ConfigError):  # it is raised where the tensor is looked at in full
        _check_op(op, dtype)
        derived = op == "AVERAGE" or dtype is torch.bool or dtype.is_complex
        return not derived and context.backend.reduces(op, dtype)
    return False


def _start_all_reduce(
    context: Context, group: Group, result: Tensor, op: str, verify: bool | None, returns: Tensor | None = None
) -> Handle:
    """Reduce ``result`` in place; the handle gives ``returns``, which shares its memory, or ``result``."""
    with _checking(context, group, Call.ALL_REDUCE, verify):
        _check_op(op, result.dtype)
    answer = result if returns is None else returns
    if group.index < 0:
        return Handle(DONE, lambda: answer)
    _verify(context, group, Call.ALL_REDUCE, result, verify, op=op)
    staged = _staged(context, result)
    work, finish = _reduce_staged(context, group, staged, op)

    def land() -> Tensor:
        finish()
        if staged is not result and staged.data_ptr() != result.data_ptr():
            result.copy_(staged)
        return answer

    return Handle(work, land)


def _reduce_staged(context: Context, group: Group, staged: Tensor, op: str) -> tuple[Work, Callable[[], Any]]:
    """Reduce in place, by way of what the backend does have; call the second result after the wait."""
    if staged.dtype is torch.bool:
        bits = staged.to(torch.uint8)
        work, finish = _reduce_staged(context, group, bits, reductions.BOOLEAN[op])
        return work, lambda: (finish(), staged.copy_(bits))
    if op == "AVERAGE":
        work, finish = _reduce_staged(context, group, staged, "SUM")
        return work, lambda: (finish(), staged.div_(group.size))
    if staged.dtype.is_complex and op == "SUM":
        parts = torch.view_as_real(staged)  # a copy where tensors are not memory, so it is copied back
        work, finish = _reduce_staged(context, group, parts, op)
        return work, lambda: (finish(), staged.copy_(torch.view_as_complex(parts)))
    if context.backend.reduces(op, staged.dtype):
        return context.backend.all_reduce_(staged, op, group), lambda: None
    rows = staged.new_empty(group.size * staged.numel())
    work = context.backend.all_gather_into(rows, staged.view(-1), group)
    return work, lambda: staged.copy_(reductions.of_tensors(rows.view(group.size, *staged.shape), op))


def _check_op(op: str, dtype: torch.dtype) -> None:
    if dtype is not torch.bool or op not in reductions.BOOLEAN:
        reductions.check(op, dtype)


def _start_all_gather(context: Context, group: Group, tensor: Tensor, verify: bool | None) -> Handle:
    if group.index < 0:
        return Handle(DONE, lambda: tensor)
    _verify(context, group, Call.ALL_GATHER, tensor, verify)
    staged = _staged(context, tensor)
    out = staged.new_empty(group.size * staged.numel())
    work = context.backend.all_gather_into(out, staged.view(-1), group)
    shape = (group.size * tensor.shape[0], *tensor.shape[1:]) if tensor.ndim else (group.size,)
    return Handle(work, lambda: out.view(shape).to(tensor.device))


def _all_gather_uneven(context: Context, group: Group, tensor: Tensor) -> Tensor:
    if group.index < 0:
        return tensor
    with _telling(context, group, Call.UNEVEN):
        if tensor.ndim == 0:
            raise ConfigError("uneven=True gathers along the first dimension, got a tensor without one")
    rest = _described(tensor.dtype, ("*", *tensor.shape[1:]))
    parts = _exchange_tensor(context, group, Message(Call.UNEVEN, Kind.TENSOR, rest), extra=tensor.shape[0])
    shapes = [torch.Size((first, *tensor.shape[1:])) for first in parts]
    return torch.cat(_start_all_gather_sizes(context, group, tensor, shapes).wait())


def _start_all_gather_sizes(context: Context, group: Group, tensor: Tensor, sizes: Sequence[torch.Size]) -> Handle:
    longest = max(size.numel() for size in sizes)
    padded = tensor.detach().new_zeros(longest)
    padded[: tensor.numel()] = tensor.detach().reshape(-1)
    gathering = _start_all_gather(context, group, padded, verify=False)

    def cut() -> list[Tensor]:
        rows = gathering.wait().view(group.size, longest)
        return [row[: size.numel()].view(size) for row, size in zip(rows, sizes, strict=True)]

    return Handle(gathering, cut)


def _start_broadcast(context: Context, group: Group, tensor: Tensor, src: int, verify: bool | None) -> Handle:
    _verify(context, group, Call.BROADCAST, tensor, verify, root=src)
    staged = _staged(context, tensor)
    if staged.data_ptr() == tensor.data_ptr():
        staged = staged.clone()
    work = context.backend.broadcast_(staged, src, group)
    return Handle(work, lambda: staged.to(tensor.device))


def _start_gather(context: Context, group: Group, tensor: Tensor, dst: int, verify: bool | None) -> Handle:
    if group.index < 0:
        return Handle(DONE, lambda: None)
    _verify(context, group, Call.GATHER, tensor, verify, root=dst)
    staged = _staged(context, tensor)
    out = staged.new_empty(group.size * staged.numel()) if context.rank == dst else None
    work = context.backend.gather_into(out, staged.view(-1), dst, group)
    shape = (group.size * tensor.shape[0], *tensor.shape[1:]) if tensor.ndim else (group.size,)
    return Handle(work, lambda: None if out is None else out.view(shape).to(tensor.device))


def _rows(tensor: Tensor, group: Group, name: str) -> int:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} takes a tensor, got {type(tensor).__name__}")
    if group.index < 0:
        return 0
    if tensor.ndim == 0 or tensor.shape[0] % group.size:
        raise ConfigError(
            f"{name} splits the first dimension over {group.size} ranks: it must be a multiple of that, "
            f"got shape {tuple(tensor.shape)}"
        )
    return tensor.shape[0] // group.size


# Agreement


def _verifies(context: Context, verify: bool | None) -> bool:
    return context.verify if verify is None else verify


@contextmanager
def _checking(context: Context, group: Group, call: Call, verify: bool | None) -> Iterator[None]:
    """Arguments are checked inside: with ``verify``, ranks whose own are right hear what is wrong here."""
    if group.index >= 0 and _verifies(context, verify):
        with _telling(context, group, call):
            yield
    else:
        yield


def _described(dtype: torch.dtype, shape: Sequence[object]) -> bytes:
    """``float32 2x3``; cut where a frame ends, which no real shape reaches."""
    return f"{str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape))}".encode()[: wire.INLINE - 20]


def _empty_as_described(description: bytes, device: torch.device) -> Tensor:
    dtype, _, shape = description.decode().partition(" ")
    return torch.empty([int(size) for size in shape.split("x") if size], dtype=getattr(torch, dtype), device=device)


def _verify(
    context: Context, group: Group, call: Call, tensor: Tensor, verify: bool | None, *, op: str = "", root: int = -1
) -> None:
    if _verifies(context, verify):
        message = Message(call, Kind.TENSOR, _described(tensor.dtype, tensor.shape), op, root)
        _exchange_tensor(context, group, message)


def _exchange_tensor(context: Context, group: Group, message: Message, extra: int | None = None) -> list[int]:
    """Check that all describe their tensor alike; exchange one integer each, if there is one."""
    suffix = b"" if extra is None else f"|{extra}".encode()
    sent = Message(message.call, message.kind, message.payload + suffix, message.op, message.root)
    if extra is None and group.size > wire.GATHERED:
        if wire.summarise(context, group, sent, same=True) is None:
            wire.tell_apart(context, group, sent)
        return []
    messages = wire.exchange(context, group, sent)
    described = [part.payload.rpartition(b"|")[0] if extra is not None else part.payload for part in messages]
    if len(set(described)) > 1:
        raise CollectiveMismatch(wire.explain(messages, group))
    return [int(part.payload.rpartition(b"|")[2]) for part in messages] if extra is not None else []


def _check_root(root: int, group: Group, name: str) -> None:
    if type(root) is not int or (group.index >= 0 and root not in group.ranks):
        raise ConfigError(f"{name} must be a rank of the group {list(group.ranks)}, got {root!r}")


def _tensors_only(async_op: bool, value: object) -> None:
    if async_op:
        raise ConfigError(f"async_op=True is for tensors of equal shape, got {type(value).__name__}")


# Values that are not tensors


def _exchange_value(
    context: Context, group: Group, call: Call, value: Any, *, op: str = "", root: int = -1, to: int | None = None
) -> list[Message]:
    """Send ``value`` in this rank's frame."""
    try:
        kind = wire.kind_of(value)
        message = Message(call, kind, wire.encode(value, kind), op, root)
    except Exception as error:
        _tell(context, group, Message(call, Kind.ERROR, op=op, root=root), error)
        raise
    return wire.exchange(context, group, message, to=to)


@contextmanager
def _telling(context: Context, group: Group, call: Call, op: str = "", root: int = -1) -> Iterator[None]:
    """If this rank cannot make its part, the others, who wait for it, hear why; then it raises as it would."""
    try:
        yield
    except Exception as error:
        _tell(context, group, Message(call, Kind.ERROR, op=op, root=root), error)
        raise


def _tell(context: Context, group: Group, message: Message, error: Exception) -> None:
    said = wire.words(f"{type(error).__name__}: {error}")
    with suppress(PeerFailed):  # that is what the others raise; this rank has the error itself
        wire.exchange(context, group, message._replace(payload=said))


def _all_reduce_number(context: Context, group: Group, value: Any, op: str) -> Any:
    if group.index < 0:
        return value
    try:
        number = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
        if wire.kind_of(number) not in wire.NUMBERS:
            raise TypeError(f"all_reduce takes a tensor or a number, got {type(value).__name__}")
        reductions.of_numbers([number], op)
    except Exception as error:
        _tell(context, group, Message(Call.ALL_REDUCE, Kind.ERROR), error)
        raise
    if group.size > wire.GATHERED:
        return _all_reduce_of_many(context, group, number, op)
    return _all_reduce_gathered(context, group, number, op)


def _all_reduce_gathered(context: Context, group: Group, number: Any, op: str) -> Any:
    messages = _exchange_value(context, group, Call.ALL_REDUCE, number, op=op)
    return reductions.of_numbers([wire.decode(message.payload, message.kind) for message in messages], op)


def _all_reduce_of_many(context: Context, group: Group, number: Any, op: str) -> Any:
    """What a rank sends and gets does not grow with their number; a product of integers does, and is gathered."""
    kind = type(number)
    step = reductions.BOOLEAN[op] if kind is bool else op
    bits = step in ("AND", "OR") and context.backend.reduces(step, torch.int64)
    if not bits and step not in ("SUM", "AVERAGE", "MIN", "MAX"):
        return _all_reduce_gathered(context, group, number, op)
    message = Message(Call.ALL_REDUCE, wire.kind_of(number), op=op)
    try:
        wire.encode(number, message.kind)
    except OverflowError as error:
        _tell(context, group, message._replace(kind=Kind.ERROR), error)
        raise
    ordered = step in ("MIN", "MAX")
    key = reductions.to_ordered(number, step) if ordered else 0
    summary = wire.summarise(context, group, message, number=key)
    if summary is None:
        wire.tell_apart(context, group, message)
    if ordered:
        return reductions.from_ordered(summary.number, step, kind)
    if kind is float:
        total = wire.all_reduce_numbers(context, group, [number], torch.float64, "SUM")[0]
    elif bits:
        total = wire.all_reduce_numbers(context, group, [number], torch.int64, step)[0]
    else:  # in two halves, whose sums have room for those of 2**31 ranks
        high, low = wire.all_reduce_numbers(context, group, [number >> 32, number & (2**32 - 1)], torch.int64, "SUM")
        total = (high << 32) + low
    return total / group.size if op == "AVERAGE" else total


def _broadcast_value(context: Context, group: Group, value: Any, src: int, safe_mode: bool) -> Any:
    """The source's frame says what comes; what does not fit in it, or a tensor, comes after it."""
    call = Call.SAFE_BROADCAST if safe_mode else Call.BROADCAST
    if context.rank == src:
        try:
            message = _announcement(call, value, src)
        except Exception as error:
            _tell(context, group, Message(call, Kind.ERROR, root=src), error)
            raise
    else:
        kind = Kind.ABSENT if safe_mode or value is None else wire.kind_of(value)
        message = Message(call, kind, root=src)
    head, length, messages = wire.hear(context, group, message, src)
    if head.kind is Kind.TENSOR:
        if not safe_mode:  # the source verifies a plain broadcast, and has seen now that nothing was announced
            raise CollectiveMismatch(wire.explain(messages, group))
        return _broadcast_announced(context, group, value, head.payload, src)
    payload = head.payload
    if length > wire.INLINE:
        rest = wire.broadcast_bytes(context, group, message.payload[wire.INLINE :], length - wire.INLINE, src)
        payload += rest
    return value if context.rank == src else wire.decode(payload, head.kind)


def _announcement(call: Call, value: Any, src: int) -> Message:
    if isinstance(value, Tensor):
        return Message(call, Kind.TENSOR, _described(value.dtype, value.shape), root=src)
    kind = wire.kind_of(value)
    return Message(call, kind, wire.encode(value, kind), root=src)


def _broadcast_announced(context: Context, group: Group, value: Any, description: bytes, src: int) -> Tensor:
    if context.rank == src:
        tensor = value
    else:
        device = value.device if isinstance(value, Tensor) else context.backend.device()
        tensor = _empty_as_described(description, device)
    received: Tensor = _start_broadcast(context, group, tensor, src, verify=False).wait()
    return received


def _start_scatter(context: Context, group: Group, values: Any, src: int, async_op: bool) -> Handle:
    """The source's frame says what comes: a tensor each, or rows of bytes of one length."""
    rows: list[bytes] | None = None
    stacked: Tensor | None = None
    message = Message(Call.SCATTER, Kind.ABSENT, root=src)
    if context.rank == src:
        with _telling(context, group, Call.SCATTER, root=src):
            if not isinstance(values, Sequence) or len(values) != group.size:
                what = f"{len(values)} values" if isinstance(values, Sequence) else type(values).__name__
                raise ConfigError(f"scatter takes a sequence of {group.size} values on rank {src}, got {what}")
            if any(isinstance(value, Tensor) for value in values):
                stacked = _stacked(values)
                message = Message(Call.SCATTER, Kind.TENSOR, _described(stacked.dtype, stacked.shape[1:]), root=src)
            else:
                _tensors_only(async_op, values[0])
                rows = _packed(values)
                message = Message(Call.SCATTER, Kind.OBJECT, str(len(rows[0])).encode(), root=src)
    head = wire.hear(context, group, message, src).message
    if head.kind is Kind.OBJECT:
        row = wire.scatter_bytes(context, group, rows, int(head.payload), src)
        value = wire.decode(row[9 : 9 + int.from_bytes(row[1:9], "big")], Kind(row[0]))
        return Handle(DONE, lambda: value)
    out = _empty_as_described(head.payload, context.backend.device())
    staged = None if stacked is None else _staged(context, stacked).to(out.device).view(-1)
    return Handle(context.backend.scatter_into(out.view(-1), staged, src, group), lambda: out)


def _stacked(values: Sequence[Any]) -> Tensor:
    described = [
        _described(value.dtype, value.shape).decode() if isinstance(value, Tensor) else type(value).__name__
        for value in values
    ]
    if len(set(described)) > 1:
        raise ConfigError(f"scatter takes tensors of one dtype and shape, got {'; '.join(described)}")
    return torch.stack([value.detach() for value in values])


def _packed(values: Sequence[Any]) -> list[bytes]:
    """A byte for the kind, eight for the length, the payload: padded to the longest."""
    parts = [(kind, wire.encode(value, kind)) for value, kind in ((value, wire.kind_of(value)) for value in values)]
    longest = max(len(payload) for _, payload in parts)
    return [bytes([kind]) + len(payload).to_bytes(8, "big") + payload.ljust(longest, b"\0") for kind, payload in parts]
