"""How numbers, strings and objects travel: as frames of one size, one small all_gather for all of them.

Every rank's frame says which collective it is in, with what kind of value and which reduction, so
ranks that disagree find out in the very message that carries the values. A payload that does not
fit in a frame follows in a second message, whose size all ranks know from the first.

What a rank gathers grows with the number of ranks. Where there are more than :data:`GATHERED`, one all_reduce of a
summary comes first, whose size is always the same: it tells whether all fit together, and carries what one rank has
for all. Frames are gathered then only if everybody's value is asked for, or to tell who does not fit.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from collections.abc import Sequence
from enum import IntEnum
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from idist import reductions
from idist.backends.base import Group
from idist.errors import CollectiveMismatch, PeerFailed
from idist.runtime import Context, wait_for

FRAME = 256
_HEADER = struct.Struct("<BBBxiq")
INLINE = FRAME - _HEADER.size
_SHARED = 8
"""The first bytes of a header, all but the length: they are the same on all ranks that fit together in every way."""
_INT = struct.Struct("<q")
_FLOAT = struct.Struct("<d")
GATHERED = 64
"""The most ranks whose frames are gathered at once: 16 KB."""
_SUMMARY = struct.Struct(f"<13q{INLINE}s")
_LOWEST = -(2**63)
_NOTHING = _INT.pack(_LOWEST) * (INLINE // _INT.size)
_NO_ROOT = -1


class Kind(IntEnum):
    """What a payload is. ABSENT agrees with everything: the rank has nothing to say."""

    ABSENT = 0
    ERROR = 1
    BOOL = 2
    INT = 3
    FLOAT = 4
    STR = 5
    PATH = 6
    OBJECT = 7
    TENSOR = 8


class Call(IntEnum):
    """The collective that a frame is part of."""

    ALL_REDUCE = 0
    ALL_GATHER = 1
    BROADCAST = 2
    GATHER = 3
    SCATTER = 4
    REDUCE_SCATTER = 5
    ALL_TO_ALL = 6
    OUTCOME = 7
    UNEVEN = 8
    SAFE_BROADCAST = 9
    WITH_SHAPES = 10
    BARRIER = 11
    SAVE = 12
    LOAD = 13


NUMBERS = frozenset({Kind.BOOL, Kind.INT, Kind.FLOAT})
OPS = ("", "SUM", "PRODUCT", "MIN", "MAX", "AND", "OR", "AVERAGE")
_NUMBER_OF = {op: number for number, op in enumerate(OPS)}
# By their numbers; to call an enumeration takes far longer.
_CALLS, _KINDS_BY_NUMBER = tuple(Call), tuple(Kind)


class Message(NamedTuple):
    """One rank's part in one collective.

    Attributes:
        call: the collective.
        kind: of the value.
        payload: the value as bytes; empty where this rank only receives.
        op: the reduction, or "".
        root: the global rank that sends or receives alone, or -1.
    """

    call: Call
    kind: Kind
    payload: bytes = b""
    op: str = ""
    root: int = _NO_ROOT

    def describe(self) -> str:
        """The part in words: ``all_reduce of int with SUM``."""
        if self.kind is Kind.ABSENT:
            what = f"{self.call.name.lower()} without a value"
        elif self.kind is Kind.TENSOR:
            what = f"{self.call.name.lower()} of a tensor {self.payload.decode().partition('|')[0]}"
        else:
            what = f"{self.call.name.lower()} of {self.kind.name.lower()}"
        return (
            what + (f" with {self.op}" if self.op else "") + (f" rooted at rank {self.root}" if self.root >= 0 else "")
        )


_KINDS: dict[type, Kind] = {bool: Kind.BOOL, int: Kind.INT, float: Kind.FLOAT, str: Kind.STR}


def kind_of(value: object) -> Kind:
    """The kind that keeps type and value: subclasses, NumPy's scalars and all the rest are objects."""
    kind = _KINDS.get(type(value))
    if kind is not None:
        return kind
    return Kind.PATH if isinstance(value, Path) else Kind.OBJECT


def encode(value: Any, kind: Kind) -> bytes:
    """The value as bytes.

    Raises:
        OverflowError: an integer of more than 64 bits.
        TypeError, pickle.PicklingError, AttributeError, ...: the object cannot be pickled.
    """
    if kind is Kind.BOOL:
        return b"\1" if value else b"\0"
    if kind is Kind.INT:
        if not -(2**63) <= value < 2**63:
            raise OverflowError(f"integers travel as 64 bits, got {value}; send larger ones as str(value)")
        return _INT.pack(value)
    if kind is Kind.FLOAT:
        return _FLOAT.pack(value)
    if kind is Kind.STR:
        return value.encode("utf-8", "surrogatepass")  # type: ignore[no-any-return]
    if kind is Kind.PATH:
        return os.fsencode(value)
    return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)


def decode(payload: bytes, kind: Kind) -> Any:
    """The inverse of :func:`encode`. Only objects are unpickled."""
    if kind is Kind.BOOL:
        return payload == b"\1"
    if kind is Kind.INT:
        return _INT.unpack(payload)[0]
    if kind is Kind.FLOAT:
        return _FLOAT.unpack(payload)[0]
    if kind is Kind.STR:
        return payload.decode("utf-8", "surrogatepass")
    if kind is Kind.PATH:
        return Path(os.fsdecode(payload))
    return pickle.loads(payload)  # noqa: S301 - object collectives only, as their docstrings say


def exchange(context: Context, group: Group, message: Message, *, to: int | None = None) -> list[Message]:
    """Every member's message, in the order of the group's ranks, checked to fit together.

    Args:
        to: the only global rank that needs payloads over 240 bytes whole; default: all.

    Raises:
        PeerFailed: a member could not make its part, and says why.
        CollectiveMismatch: the members are in different collectives, or have different kinds of values.

    Cost: one all_gather of 256 bytes per rank; if the longest payload is over 240 bytes, a second
    one (or a gather, with ``to``) of the rest of it.
    """
    if group.size > GATHERED:
        summarise(context, group, message)  # the frames tell all that it does, but others may stop at it
    messages, lengths = _gather_heads(context, group, message)
    longest = max(lengths) - INLINE
    if longest <= 0:
        return messages
    rest = _gather_bytes(context, group, message.payload[INLINE:].ljust(longest, b"\0"), to)
    tails = [rest[i * longest : i * longest + max(length - INLINE, 0)] for i, length in enumerate(lengths)]
    return [m._replace(payload=m.payload + tail) for m, tail in zip(messages, tails, strict=True)]


class Heard(NamedTuple):
    """What rank ``src`` says to all.

    Attributes:
        message: its own, with the first 240 bytes of the payload.
        length: of all of the payload.
        messages: of all ranks, where they were gathered.
    """

    message: Message
    length: int
    messages: Sequence[Message] = ()


def hear(context: Context, group: Group, message: Message, src: int) -> Heard:
    """What rank ``src`` says, when all fit together; the others' payloads are not asked for.

    Raises:
        PeerFailed, CollectiveMismatch: as :func:`exchange`.

    Cost: one all_gather of 256 bytes per rank or, for many ranks, one all_reduce of 344 bytes.
    """
    if group.size > GATHERED:
        summary = summarise(context, group, message, src=src)
        if summary is not None:
            payload = summary.payload[: min(summary.length, INLINE)]
            return Heard(message._replace(kind=summary.kind, payload=payload), summary.length)
    messages, lengths = _gather_heads(context, group, message)
    place = group.place(src)
    return Heard(messages[place], lengths[place], messages)


def agree(context: Context, group: Group, message: Message) -> None:
    """Return when all have come here, and fit together.

    Raises:
        PeerFailed, CollectiveMismatch: as :func:`exchange`.

    Cost: as :func:`hear`.
    """
    if group.size <= GATHERED:
        _gather_heads(context, group, message)
    elif summarise(context, group, message) is None:
        tell_apart(context, group, message)


def tell_apart(context: Context, group: Group, message: Message) -> NoReturn:
    """After a summary of ranks that do not fit together: everybody's frame tells who does what.

    Raises:
        PeerFailed, CollectiveMismatch: as :func:`exchange`.

    Cost: one all_gather of 256 bytes per rank.
    """
    messages, _ = _gather_heads(context, group, message)
    raise CollectiveMismatch(explain(messages, group))


class Summary(NamedTuple):
    """What all ranks together have said, who fit together.

    Attributes:
        kind: of the value, if somebody has one.
        number: the largest.
        length: of the payload of the rank that speaks to all.
        payload: its first 240 bytes.
    """

    kind: Kind
    number: int
    length: int
    payload: bytes


def summarise(
    context: Context,
    group: Group,
    message: Message,
    *,
    src: int | None = None,
    same: bool = False,
    number: int = _LOWEST,
) -> Summary | None:
    """The largest of everything, which all ranks get alike: with its negative it tells whether it is the same on all.

    Args:
        src: the rank that speaks to all, if one does.
        same: the payloads have to be equal.
        number: of 64 bits.

    Returns:
        None, on all ranks, if they do not fit together or one has failed; they all gather frames then, and hear why.

    Cost: one all_reduce of 344 bytes, however many ranks there are.
    """
    call, kind, payload, op, root = message
    number_of_op = _NUMBER_OF[op]
    digest = int.from_bytes(hashlib.blake2b(payload, digest_size=7).digest(), "little") if same else 0
    kinds = (-1, _LOWEST) if kind is Kind.ABSENT else (kind, -kind)
    speaks = src == context.rank
    said = payload[:INLINE].ljust(INLINE, b"\0") if speaks else _NOTHING
    length = len(payload) if speaks else _LOWEST
    alike = (call, -call, number_of_op, -number_of_op, root, -root, digest, -digest)
    memory = bytearray(_SUMMARY.pack(*alike, *kinds, kind is Kind.ERROR, number, length, said))
    all_reduce_bytes(context, group, memory, torch.int64, "MAX")
    *pairs, failed, number, length, said = _SUMMARY.unpack(memory)
    most, least = pairs[::2], [-negative for negative in pairs[1::2]]
    nobody = most[-1] == -1
    if failed or most[:-1] != least[:-1] or not (nobody or most[-1] == least[-1]):
        return None
    return Summary(Kind.ABSENT if nobody else _KINDS_BY_NUMBER[most[-1]], number, length, said)


def all_reduce_bytes(context: Context, group: Group, memory: bytearray, dtype: torch.dtype, op: str) -> None:
    """Reduce what is in ``memory``, as numbers of this type, in place. Cost: one all_reduce."""
    tensor = torch.frombuffer(memory, dtype=dtype)
    staged = tensor.to(context.backend.device())
    if context.backend.reduces(op, dtype):
        wait_for(context.backend.all_reduce_(staged, op, group))
    else:
        rows = staged.new_empty(group.size * staged.numel())
        wait_for(context.backend.all_gather_into(rows, staged, group))
        stacked = rows.view(group.size, -1)
        # torch's sum begins with 0, which would lose the sign of -0.0
        staged = reduce(torch.add, stacked) if op == "SUM" else reductions.of_tensors(stacked, op)
    tensor.copy_(staged)


def all_reduce_numbers(
    context: Context, group: Group, numbers: Sequence[Any], dtype: torch.dtype, op: str
) -> list[Any]:
    """A few numbers, each reduced over the ranks. Cost: one all_reduce."""
    memory = bytearray(struct.pack(f"<{len(numbers)}{'d' if dtype is torch.float64 else 'q'}", *numbers))
    all_reduce_bytes(context, group, memory, dtype, op)
    found: list[Any] = torch.frombuffer(memory, dtype=dtype).tolist()
    return found


def _gather_heads(context: Context, group: Group, message: Message) -> tuple[list[Message], list[int]]:
    """Everybody's payload up to 240 bytes, and how long it is in full."""
    header = _HEADER.pack(*message[:2], _NUMBER_OF[message.op], message.root, len(message.payload))
    frames = group.scratch.pop(_Frames, None) or _Frames(group.size, context.backend.device())
    gathered = frames.exchange(context, group, header + message.payload[:INLINE])
    if message.kind is not Kind.ERROR and len(message.payload) <= INLINE:
        starts = range(0, len(gathered), FRAME)
        if all(gathered[start : start + _HEADER.size] == header for start in starts):  # as numbers are
            call, kind, mine, op, root = message
            ends = _HEADER.size + len(mine)
            same = [
                Message(call, kind, bytes(gathered[start + _HEADER.size : start + ends]), op, root) for start in starts
            ]
            group.scratch[_Frames] = frames
            return same, [len(mine)] * group.size
    messages, lengths, alike = [], [], message.kind is not Kind.ERROR
    for start in range(0, len(gathered), FRAME):
        call, kind, op, root, length = _HEADER.unpack_from(gathered, start)
        body = start + _HEADER.size
        payload = bytes(gathered[body : body + min(length, INLINE)])
        messages.append(Message(_CALLS[call], _KINDS_BY_NUMBER[kind], payload, OPS[op], root))
        lengths.append(length)
        alike = alike and gathered[start : start + _SHARED] == header[:_SHARED]
    group.scratch[_Frames] = frames
    if not alike:
        _check(messages, group)
    return messages, lengths


class _Frames:
    """The memory of one exchange, on its way and where it comes from: made once for a group, used by one at a time."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._mine, self._gathered = bytearray(FRAME), bytearray(size * FRAME)
        # Over the byte arrays: no copy, and no need of NumPy.
        self._tensor, self._out = (torch.frombuffer(m, dtype=torch.uint8) for m in (self._mine, self._gathered))
        self._staged_tensor, self._staged_out = self._tensor.to(device), self._out.to(device)

    def exchange(self, context: Context, group: Group, frame: bytes) -> bytearray:
        """The frames of all ranks; to be read before the next exchange."""
        self._mine[: len(frame)] = frame
        if self._staged_tensor is not self._tensor:
            self._staged_tensor.copy_(self._tensor)
        wait_for(context.backend.all_gather_into(self._staged_out, self._staged_tensor, group))
        if self._staged_out is not self._out:
            self._out.copy_(self._staged_out)
        return self._gathered


def words(text: str) -> bytes:
    """What was said, as much of it as fits in a frame, whatever characters it is made of."""
    return text.encode(errors="backslashreplace")[:INLINE]


def broadcast_bytes(context: Context, group: Group, mine: bytes, length: int, src: int) -> bytes:
    """Rank ``src``'s bytes, whose length all know already. Cost: one broadcast."""
    memory = bytearray(mine if context.rank == src else bytes(length))
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    staged = tensor.to(context.backend.device())
    wait_for(context.backend.broadcast_(staged, src, group))
    tensor.copy_(staged)
    return bytes(memory)


def scatter_bytes(context: Context, group: Group, rows: list[bytes] | None, length: int, src: int) -> bytes:
    """This rank's row of rank ``src``'s, all of one length that all know already. Cost: one scatter."""
    memory = bytearray(length)
    out = torch.frombuffer(memory, dtype=torch.uint8)
    device = context.backend.device()
    staged = out.to(device)
    tensor = None if rows is None else torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).to(device)
    wait_for(context.backend.scatter_into(staged, tensor, src, group))
    out.copy_(staged)
    return bytes(memory)


def _gather_bytes(context: Context, group: Group, mine: bytes, to: int | None = None) -> bytearray:
    """Equally many bytes of every member. The tensors lie over the byte arrays: no copy, and no need of NumPy."""
    gathered = bytearray(group.size * len(mine))
    device = context.backend.device()
    tensor = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(device)
    out = torch.frombuffer(gathered, dtype=torch.uint8)
    staged = out.to(device)
    if to is None:
        wait_for(context.backend.all_gather_into(staged, tensor, group))
    else:
        wait_for(context.backend.gather_into(staged if context.rank == to else None, tensor, to, group))
    if staged is not out:
        out.copy_(staged)
    return gathered


def _check(messages: list[Message], group: Group) -> None:
    errors = {
        rank: m.payload.decode(errors="ignore")
        for rank, m in zip(group.ranks, messages, strict=True)
        if m.kind is Kind.ERROR
    }
    if errors:
        said = "; ".join(f"rank {rank}: {error}" for rank, error in errors.items())
        raise PeerFailed(f"{messages[0].call.name.lower()} cannot go on. {said}")
    if not _fit(messages):
        raise CollectiveMismatch(explain(messages, group))


def _fit(messages: Sequence[Message]) -> bool:
    """Whether all are in one collective with one reduction and root, and one kind of value where there is one."""
    first = messages[0]
    kind = next((m.kind for m in messages if m.kind is not Kind.ABSENT), Kind.ABSENT)
    return all(
        m.call is first.call and m.op == first.op and m.root == first.root and m.kind in (kind, Kind.ABSENT)
        for m in messages
    )


def explain(messages: Sequence[Message], group: Group) -> str:
    """The parts side by side, the ranks that have the same one together."""
    by_part: dict[str, list[str]] = {}
    for rank, message in zip(group.ranks, messages, strict=True):
        by_part.setdefault(message.describe(), []).append(str(rank))
    table = "".join(f"\n  rank {', '.join(ranks)}: {part}" for part, ranks in by_part.items())
    return f"the ranks do not fit together; all must make the same call with the same kind of value:{table}"
