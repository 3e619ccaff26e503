"""Strings, paths, None and any other object, through every collective that takes them."""

from __future__ import annotations

import dataclasses
import os
from collections import OrderedDict
from collections.abc import Callable
from decimal import Decimal
from enum import IntEnum
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch

import idist
from conformance.values import last, of_all, raises, same
from idist.wire import INLINE


class Colour(IntEnum):
    RED = 1


@dataclasses.dataclass
class Record:
    name: str
    tensor: torch.Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and self.name == other.name and torch.equal(self.tensor, other.tensor)


VALUES: dict[str, Callable[[int], Any]] = {
    "empty string": lambda rank: "",
    "string": lambda rank: f"rank {rank}",
    "non-ASCII": lambda rank: f"é 日本 \U0001f600 {rank}",
    "lone surrogate": lambda rank: f"a\udc80\ud800{rank}",
    "null characters": lambda rank: "\0" * rank + "a\0",
    "lengths differ": lambda rank: "é" * (rank * 97),
    "one rank is long": lambda rank: "日" * (1000 if rank == last() else 1),
    "one rank is empty": lambda rank: "" if rank == last() else "x" * 1000,
    "1 MB": lambda rank: "x" * 2**20 if rank == last() else "y" * rank,
    "path": lambda rank: Path("/tmp") / f"é {rank}",
    "path that is no unicode": lambda rank: Path(os.fsdecode(b"/tmp/\xff\xfe")) / str(rank),
    "None": lambda rank: None,
    "bytes": lambda rank: b"\xff\0" * (rank + 1),
    "complex": lambda rank: 1j * rank,
    "nested": lambda rank: {"a": [1, (2.5, None, True)], ("b", rank): {"é": {rank}}, 2**70: Decimal("0.1")},
    "empty containers": lambda rank: [{}, [], (), set(), ""],
    "sizes differ": lambda rank: list(range(rank * 1000)),
    "large": lambda rank: {"data": b"x" * 2**20, "rank": rank},
    "subclass of int": lambda rank: Colour.RED,
    "subclass of dict": lambda rank: OrderedDict(a=rank),
    "pure path": lambda rank: PurePosixPath("a") / str(rank),
    "type": lambda rank: Record,
    "tensor inside": lambda rank: Record("é", torch.arange(float(rank))),
    "exception": lambda rank: repr(ValueError(rank)),
}


@pytest.mark.parametrize("value", VALUES)
def test_all_gather(value: str) -> None:
    same(idist.all_gather(VALUES[value](idist.get_rank())), of_all(VALUES[value]))


@pytest.mark.parametrize("value", VALUES)
def test_gather(value: str) -> None:
    for destination in (0, last()):
        result = idist.gather(VALUES[value](idist.get_rank()), dst=destination)
        same(result, of_all(VALUES[value]) if idist.get_rank() == destination else None)


@pytest.mark.parametrize("value", VALUES)
def test_broadcast(value: str) -> None:
    for source in (0, last()):
        given = VALUES[value](source)
        same(idist.broadcast(given if idist.get_rank() == source else None, src=source), given)
        same(idist.broadcast(VALUES[value](idist.get_rank()), src=source), given)


@pytest.mark.parametrize("value", VALUES)
def test_scatter(value: str) -> None:
    for source in (0, last()):
        given = of_all(VALUES[value]) if idist.get_rank() == source else None
        same(idist.scatter(given, src=source), VALUES[value](idist.get_rank()))


@pytest.mark.parametrize("length", [1, INLINE - 1, INLINE, INLINE + 1, 2 * INLINE])
@pytest.mark.parametrize("letter", ["x", "é"])
def test_where_a_frame_ends(length: int, letter: str) -> None:
    """KNOWN-FAILURES 16: "é" raised UnicodeDecodeError; one long non-ASCII rank raised while its peer waited."""
    text = letter * (length // len(letter.encode())) + "!" * (length % len(letter.encode()))
    assert len(text.encode()) == length
    size, rank = idist.get_world_size(), idist.get_rank()
    same(idist.all_gather(text), [text] * size)
    same(idist.all_gather(text if rank == last() else ""), [""] * last() + [text])
    same(idist.broadcast(text if rank == last() else None, src=last()), text)
    same(idist.gather(text, dst=last()), [text] * size if rank == last() else None)
    same(idist.scatter([text] * size), text)


def test_objects_that_come_are_copies() -> None:
    given = {"a": [1]}
    for item in (idist.all_gather(given)[0], idist.scatter([given] * idist.get_world_size())):
        item["a"].append(2)
    assert given == {"a": [1]}


class Stubborn:
    """Cannot be pickled, and says why."""

    def __init__(self, why: str) -> None:
        self.why = why

    def __reduce__(self) -> Any:
        raise ValueError(self.why)


def deep() -> Any:
    found: list[Any] = []
    for _ in range(5_000):
        found = [found]
    return found


UNSENDABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "refuses": (lambda: Stubborn("because"), "ValueError: because"),
    "refuses without a word": (lambda: Stubborn(""), "ValueError"),
    "refuses at length": (lambda: Stubborn("é" * 1000), "ValueError: ééé"),
    "refuses at odd length": (lambda: Stubborn("aé" * 1000), "ValueError: aéa"),
    "refuses in lone surrogates": (lambda: Stubborn("\udc80!"), "ValueError"),
    "refuses inside": (lambda: {"a": [Stubborn("because")]}, "ValueError: because"),
    "function inside a function": (lambda: lambda: None, "lambda"),
    "open file": (lambda: open(os.devnull), "TextIOWrapper"),  # noqa: SIM115 - freed at once, below
    "too deep": (deep, "RecursionError"),
}

CALLS: dict[str, Callable[[Any], Any]] = {
    "all_gather": idist.all_gather,
    "gather": lambda value: idist.gather(value, dst=last()),
    "all_gather in a group": lambda value: idist.all_gather(value, group=of_all(int)),
}


def unsendable(name: str, call: Callable[[Any], Any]) -> None:
    value = UNSENDABLE[name][0]()
    try:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever pickle or the object says
            call(value)
    finally:
        if hasattr(value, "close"):
            value.close()
    assert not isinstance(caught.value, (idist.IdistError, UnicodeError)), f"not its own error: {caught.value!r}"


@pytest.mark.parametrize("name", UNSENDABLE)
@pytest.mark.parametrize("call", CALLS)
def test_what_cannot_be_sent_by_any_rank(name: str, call: str) -> None:
    unsendable(name, CALLS[call])
    same(idist.all_gather(idist.get_rank()), of_all(int))


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize("name", UNSENDABLE)
@pytest.mark.parametrize("call", CALLS)
def test_what_cannot_be_sent_by_one_rank_is_an_error_on_every_rank(name: str, call: str) -> None:
    for culprit in (0, last()):
        if idist.get_rank() == culprit:
            unsendable(name, CALLS[call])
        else:
            with raises(idist.PeerFailed, f"rank {culprit}: ", UNSENDABLE[name][1]):
                CALLS[call]("x" * 1000)
        same(idist.all_gather(idist.get_rank()), of_all(int))


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize("name", UNSENDABLE)
def test_what_cannot_be_sent_by_the_source_is_an_error_on_every_rank(name: str) -> None:
    size = idist.get_world_size()
    calls: list[Callable[[Any], Any]] = [
        lambda value: idist.broadcast(value, src=last()),
        lambda value: idist.broadcast(value, src=last(), safe_mode=True),
        lambda value: idist.scatter([1] * (size - 1) + [value], src=last()),
    ]
    for call in calls:
        if idist.get_rank() == last():
            unsendable(name, call)
        else:
            with raises(idist.PeerFailed, f"rank {last()}: ", UNSENDABLE[name][1]):
                call(None)
        same(idist.all_gather(idist.get_rank()), of_all(int))


@pytest.mark.ranks(at_least=2)
def test_what_cannot_be_sent_does_not_matter_where_it_is_not_sent() -> None:
    given: Any = "x" if idist.get_rank() == 0 else Stubborn("because")
    same(idist.broadcast(given, safe_mode=True), "x")
    same(idist.scatter(of_all(int) if idist.get_rank() == 0 else [Stubborn("because")]), idist.get_rank())


class Bomb:
    """Can be pickled, but not be rebuilt."""

    def __reduce__(self) -> Any:
        return explode, ()


def explode() -> None:
    raise ZeroDivisionError("when rebuilt")


def test_what_cannot_be_rebuilt_leaves_the_ranks_in_step() -> None:
    with raises(ZeroDivisionError, "when rebuilt"):
        idist.all_gather(Bomb())
    same(idist.all_gather(idist.get_rank()), of_all(int))
