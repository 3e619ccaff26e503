"""The report of a hang, made of what the ranks have said."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

_MOST_STACKS = 8
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Statement:
    """What a rank says of itself.

    Attributes:
        process: its number and host.
        waits: whether it waits for other ranks.
        operation: in which it is; ``""``: in none.
        number: which one that is of the operations of its group, where the backend counts; else 0.
        group: how the backend calls the group.
        ranks: those of the group; ``None``: all.
        begun: how many operations this rank has begun, by group.
        where: the user's file, line and function.
        seconds: how long it has been there.
        since: of the clock, when it came there.
        stack: its frames, outermost first.
    """

    rank: int
    process: str
    waits: bool
    operation: str
    number: int
    group: str
    ranks: tuple[int, ...] | None
    begun: Mapping[str, int]
    where: str
    seconds: float
    since: str
    stack: tuple[str, ...]

    def to_json(self) -> str:
        """As it travels: nothing that comes by the store is unpickled."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Statement:
        """The inverse of :meth:`to_json`."""
        said = json.loads(text)
        ranks = said["ranks"]
        return cls(**{**said, "ranks": None if ranks is None else tuple(ranks), "stack": tuple(said["stack"])})


def render(statements: Sequence[Statement], world_size: int, processes: Mapping[int, str], hint: str = "") -> str:
    """The report.

    Args:
        statements: of the ranks that have answered.
        processes: number and host of those that have not, as far as they are known.
        hint: what else there is to look at.
    """
    waiting = [each for each in statements if each.waits]
    groups = [each.ranks for each in waiting]
    concerned = set(range(world_size)) if None in groups else {rank for ranks in groups for rank in ranks or ()}
    silent = sorted(concerned - {each.rank for each in statements})
    late = [each for each in statements if not each.waits and each.rank in concerned]
    parts = [_headline(waiting, late, silent, world_size), _waiting(waiting)]
    if late:
        parts.append(_late(late, waiting))
    if silent:
        parts.append(_silent(silent, processes))
    if not late and not silent:
        parts.append(_explained(waiting))
    return "\n".join([*parts, *([hint] if hint else [])])


def render_alone(statement: Statement, world_size: int, why: str, hint: str) -> str:
    """The report of one rank, which waits, where the others cannot be asked."""
    told = f"idist: rank {statement.rank} of {world_size} waits, for {_seconds(statement.seconds)} now"
    told += f"; the others cannot be asked: {why}."
    return "\n".join([told, _waiting([statement]), *([hint] if hint else [])])


def _headline(waiting: Sequence[Statement], late: Sequence[Statement], silent: Sequence[int], world_size: int) -> str:
    longest = max(each.seconds for each in waiting)
    told = [f"{len(waiting)} of {world_size} ranks wait, for {_seconds(longest)} now"]
    if late:
        told.append(f"{_ranks(each.rank for each in late)} {_has(len(late))} not come")
    if silent:
        told.append(f"{_ranks(silent)} {'does' if len(silent) == 1 else 'do'} not answer")
    return f"idist: {'; '.join(told)}."


def _waiting(waiting: Sequence[Statement]) -> str:
    lines = ["  Waiting:"]
    for (operation, number, ranks, where), members in _alike(
        waiting, lambda each: (each.operation, each.number, each.ranks, each.where)
    ):
        first = max(members, key=lambda each: each.seconds)
        which = f" (number {number} of its group)" if number else ""
        inside = "" if ranks is None else f", in the group of {_ranks(ranks)}"
        lines.append(
            f"    {_ranks(each.rank for each in members)}: {operation}{which}{inside}, at {where}, "
            f"since {first.since} ({_seconds(first.seconds)})"
        )
    return "\n".join(lines)


def _late(late: Sequence[Statement], waiting: Sequence[Statement]) -> str:
    """Those that the others wait for, with their stacks; behind in number, or in what is no operation."""
    group = next((each.group for each in waiting if each.group), "")
    lines = ["  Not come:"]
    by_stack = _alike(late, lambda each: (each.stack, each.begun.get(group, 0)))
    for (stack, begun), members in by_stack[:_MOST_STACKS]:
        first = max(members, key=lambda each: each.seconds)
        last = f"; its last one in the group was number {begun}" if begun else ""
        lines.append(
            f"    {_ranks(each.rank for each in members)} ({first.process}): at {first.where}, "
            f"has begun no operation since {first.since} ({_seconds(first.seconds)}){last}"
        )
        lines += [f"      {line}" for line in stack]
    if len(by_stack) > _MOST_STACKS:
        others = [each.rank for _, members in by_stack[_MOST_STACKS:] for each in members]
        lines.append(f"    {_ranks(others)}: elsewhere again")
    return "\n".join(lines)


def _silent(silent: Sequence[int], processes: Mapping[int, str]) -> str:
    named = [f"{rank} ({processes[rank]})" if rank in processes else str(rank) for rank in silent[:_MOST_STACKS]]
    more = f" and {len(silent) - _MOST_STACKS} more" if len(silent) > _MOST_STACKS else ""
    return (
        f"  No answer:\n    rank {', '.join(named)}{more}: does not answer since {_now()}. It is stopped or dead, its "
        "machine is gone, or C code keeps Python's lock."
    )


def _explained(waiting: Sequence[Statement]) -> str:
    """Nobody is missing: why does it not go on?"""
    if len({(each.operation, each.number, each.ranks) for each in waiting}) > 1:
        return (
            "  Nobody is missing: the ranks are in different operations, and each waits for the others to come to "
            "its own. IDIST_VERIFY=1 makes that an error at once."
        )
    return "  Nobody is missing: all ranks are in it, and it does not end. Look at the network between them."


def _alike(statements: Sequence[Statement], what: Callable[[Statement], T]) -> list[tuple[T, list[Statement]]]:
    """Those of whom the same is to be said, together; in the order of their first ranks."""
    found: dict[T, list[Statement]] = {}
    for each in sorted(statements, key=lambda each: each.rank):
        found.setdefault(what(each), []).append(each)
    return list(found.items())


def _ranks(ranks: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0-2, 5``."""
    ordered = sorted(ranks)
    runs: list[list[int]] = []
    for rank in ordered:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    told = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' * (len(ordered) > 1)} {', '.join(told)}"


def _has(count: int) -> str:
    return "has" if count == 1 else "have"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s"


def _now() -> str:
    return time.strftime("%H:%M:%S")
