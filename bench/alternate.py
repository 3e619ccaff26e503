"""What all benchmarks share: cases run in turns, each turn of ours beside the same turn of theirs, ratios with spread.

The load of the machine comes and goes, and hits both sides of a turn alike; so a ratio is that of one turn, and what
is printed is the median of all turns and, as their spread, the middle half of them. Other programs only ever add to a
time; so the fastest tenths of both sides are compared as well. A target is met, or missed, if both ratios say so; else
that is open. Times are those of one machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

UNITS = {"s": 1.0, "ms": 1e3, "µs": 1e6, "ns": 1e9}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Ours beside theirs.

    Attributes:
        what: was done.
        beside: whom it is compared with.
        ours: seconds, one for each turn.
        theirs: likewise, in the same turns.
        target: the most that the ratio may be.
    """

    what: str
    beside: str
    ours: Sequence[float]
    theirs: Sequence[float]
    target: float

    @property
    def ratio(self) -> tuple[float, float, float]:
        """The median of the turns, and the first and third quartile."""
        ratios = [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]
        if len(ratios) == 1:
            return ratios[0], ratios[0], ratios[0]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return statistics.median(ratios), low, high

    @property
    def fastest(self) -> float:
        """The ratio of the fastest turns."""
        return fast(self.ours) / fast(self.theirs)

    def row(self) -> str:
        """A line of the table in Markdown."""
        ratio, low, high = self.ratio
        ours, theirs = fast(self.ours), fast(self.theirs)
        unit = next(unit for unit, factor in UNITS.items() if min(ours, theirs) * factor >= 1 or unit == "ns")
        times = " | ".join(f"{seconds * UNITS[unit]:.4g} {unit}" for seconds in (ours, theirs))
        spread = f"{self.fastest:.3f} | {ratio:.3f} ({low:.3f} to {high:.3f})"
        within = {self.fastest <= self.target, ratio <= self.target}
        met = "open" if len(within) > 1 else "yes" if within == {True} else "no"
        return f"| {self.what} | {self.beside} | {times} | {spread} | {self.target:.3g} | {met} |"


def fast(times: Sequence[float]) -> float:
    """The mean of the fastest tenth, one turn at least: of many turns the very fastest is an accident."""
    return statistics.fmean(sorted(times)[: max(len(times) // 10, 1)])


HEADER = (
    "| what | beside | idist | the other | ratio | of all turns (middle half) | target | met |\n"
    "|---|---|--:|--:|--:|--:|--:|---|"
)


def alternate(cases: Mapping[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """What each case returns, ``turns`` times, one case after the other; every second turn backwards."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(turns):
        for name in list(cases)[:: 1 if turn % 2 == 0 else -1]:
            times[name].append(cases[name]())
    return times


def with_bytecode(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that keeps its modules compiled, as pip has compiled those of the peers."""
    return {name: value for name, value in env.items() if name != "PYTHONDONTWRITEBYTECODE"}


def arguments(doc: str | None, turns: int) -> argparse.Namespace:
    """Those of every benchmark: ``--turns``, ``--quick`` and ``--json``."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=turns, help="turns of each case")
    parser.add_argument("--quick", action="store_true", help="the smallest size, to see that it works")
    parser.add_argument("--json", action="store_true", help="print the times of all turns")
    options = parser.parse_args()
    if options.quick:
        options.turns = 1
    return options


def report(comparisons: Iterable[Comparison], *, as_json: bool) -> None:
    """Print a table, or a line of JSON for each comparison."""
    if not as_json:
        print(HEADER)
    for comparison in comparisons:
        sys.stdout.write((json.dumps(dataclasses.asdict(comparison)) if as_json else comparison.row()) + "\n")
    sys.stdout.flush()
