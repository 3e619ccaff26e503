"""Slurm's short forms: ``node[1-4,07-09],login1`` for hosts and ``2(x3),1`` for tasks per node.

Source: https://slurm.schedmd.com/scontrol.html (SHOW HOSTNAMES) and the output variables of
https://slurm.schedmd.com/srun.html.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from idist.errors import LaunchError

# Slurm itself refuses longer ranges; here it keeps a mistyped list from filling the memory.
MOST_HOSTS = 65536

_PIECES = re.compile(r"\[([^\[\]]*)\]|([^\[\],]+)|(,)")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
_COUNT = re.compile(r"([0-9]{1,18})(?:\(x([0-9]{1,18})\))?")


def hosts(text: str) -> tuple[str, ...]:
    """The host names of a Slurm host list, in its order.

    ``rack[1-2]n[01-02],login1`` is ``rack1n01 rack1n02 rack2n01 rack2n02 login1``.

    Raises:
        LaunchError: ``text`` is not a host list, or one of more than 65536 hosts.
    """
    names: list[str] = []
    for words in _entries(text):
        names.extend("".join(word) for word in itertools.islice(itertools.product(*words), MOST_HOSTS + 1))
        if len(names) > MOST_HOSTS:
            raise _not_a_list(text, f"it has more than {MOST_HOSTS} hosts")
    return tuple(names)


def tasks_on(text: str, node: int) -> int:
    """The number of tasks on one node, by its place in the list: ``2(x3),1`` is 2 for 0 to 2 and 1 for 3.

    Raises:
        LaunchError: ``text`` is no such list, or too short for ``node``.
    """
    end = 0
    for count, repeat in list(_runs(text)):  # all of it first: a list with a broken end is not believed at all
        end += repeat
        if node < end:
            return count
    raise LaunchError(
        f"slurm: {text!r} tells the tasks of {end} nodes; there is none at place {node} (counted from 0)."
    )


def total_tasks(text: str) -> tuple[int, int]:
    """The number of nodes and of all tasks in a list such as ``2(x3),1``: 4 and 7."""
    runs = list(_runs(text))
    return sum(repeat for _, repeat in runs), sum(count * repeat for count, repeat in runs)


def _runs(text: str) -> Iterator[tuple[int, int]]:
    for run in text.split(","):
        match = _COUNT.fullmatch(run)
        if match is None:
            raise LaunchError(f"slurm: {text!r} is not a list of tasks per node; expected one like '2(x3),1'.")
        yield int(match[1]), int(match[2] or 1)


def _entries(text: str) -> Iterator[list[list[str]]]:
    """Each entry between the outer commas as the choices for every part of the name."""
    entry: list[list[str]] = []
    place = 0
    for match in _PIECES.finditer(text):
        if match.start() != place:
            break
        place = match.end()
        if match[3]:
            yield _complete(entry, text)
            entry = []
        else:
            entry.append([match[2]] if match[2] else _numbers(match[1], text))
    if place != len(text):
        raise _not_a_list(text, f"{text[place]!r} at position {place + 1} has no partner")
    yield _complete(entry, text)


def _complete(entry: list[list[str]], text: str) -> list[list[str]]:
    if not entry:
        raise _not_a_list(text, "a host name is missing")
    return entry


def _numbers(ranges: str, text: str) -> list[str]:
    numbers: list[str] = []
    for each in ranges.split(","):
        match = _RANGE.fullmatch(each)
        if match is None:
            raise _not_a_list(text, f"{each!r} between brackets is not a number or a range like 1-4")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise _not_a_list(text, f"the range {each} runs backwards")
        if int(last) - int(first) + len(numbers) >= MOST_HOSTS:
            raise _not_a_list(text, f"it has more than {MOST_HOSTS} hosts")
        # The width of the first number is that of all: 07-10 is 07, 08, 09, 10.
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers


def _not_a_list(text: str, problem: str) -> LaunchError:
    shown = text if len(text) <= 200 else text[:200] + "..."
    return LaunchError(f"slurm: {shown!r} is not a host list: {problem}. Expected one like 'node[1-4,07],login1'.")
