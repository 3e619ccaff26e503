"""The tables of docs/failures.md, made of what the tests of the matrix have noted.

``python -m matrix.table FOLDER``, with tests/ on the path, writes the page anew; ``make failures`` does all of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matrix.cells import FACTS, KINDS, LAUNCHERS, MOMENTS, Cell, Fact, known

PAGE = Path(__file__).parents[2] / "docs" / "failures.md"
BEGIN, END = "<!-- made by make failures -->\n", "<!-- end -->\n"

Noted = Mapping[str, Any]
"""Of a cell: its seconds, and its problems."""


def write(folder: Path, cell: Cell, seconds: float, problems: tuple[str, ...]) -> None:
    """Note how a cell ended."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{cell}.json").write_text(json.dumps({"cell": cell, "seconds": seconds, "problems": problems}))


def read(folder: Path) -> dict[Cell, Noted]:
    """All that was noted."""
    noted = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return {Cell(*each["cell"]): each for each in noted}


def tables(noted: Mapping[Cell, Noted]) -> str:
    """A table for each launcher, and the facts that they refer to."""
    text = ""
    for launcher in LAUNCHERS:
        text += f"\n### {launcher}\n\n| | {' | '.join(MOMENTS)} |\n|---|{'--:|' * len(MOMENTS)}\n"
        for kind in KINDS:
            cells = [Cell(launcher, kind.name, moment) for moment in MOMENTS]
            text += f"| {kind.name} | {' | '.join(shown(cell, noted.get(cell)) for cell in cells)} |\n"
    notes = "".join(f"{number}. {note(fact)}\n" for number, fact in enumerate(FACTS, 1))
    return f"{text}\n### Notes\n\n{notes}\n"


def note(fact: Fact) -> str:
    """What is not as it should be, and why."""
    what = ", ".join(fact.problems)
    return f"{what[0].upper()}{what[1:]}: {fact.reason}"


def shown(cell: Cell, noted: Noted | None) -> str:
    """``1.8 s``, and the numbers of the notes."""
    if noted is None:
        return "not run"
    problems = set(noted["problems"])
    facts = [number for number, fact in enumerate(FACTS, 1) if fact.holds(cell) and problems & set(fact.problems)]
    unknown = ["**fails**"] if problems - known(cell, busy=True) else []
    return " ".join([f"{noted['seconds']:.1f} s", *(f"({number})" for number in facts), *unknown])


def main(folder: Path) -> None:
    head, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(head + BEGIN + tables(read(folder)) + END + tail)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
