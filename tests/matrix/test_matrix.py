"""KNOWN-FAILURES 25, whole: whatever fails, and whenever, the job ends in time, says why, and leaves nothing.

Some cells run every time; ``make failures`` runs them all and writes the tables of docs/failures.md.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from matrix import driver, table
from matrix.cells import FACTS, KINDS, LAUNCHERS, MOMENTS, Cell, cells, is_sample, known

FOLDER = os.environ.get("IDIST_FAILURES")
"""Where the outcome is noted."""

OPEN_MPI = (Path(sys.executable).parent / "ompi_info").exists()
MARKS = {
    "spawn": [],
    "torchrun": [],
    "srun": [pytest.mark.slurm],
    "mpiexec of MPICH": [pytest.mark.mpi],
    "mpiexec of Open MPI": [pytest.mark.mpi],
    "horovodrun": [pytest.mark.horovod],
}


def parameters() -> Iterator[Any]:
    elsewhere = "mpiexec of MPICH" if OPEN_MPI else "mpiexec of Open MPI"
    for cell in cells():
        if cell.launcher != elsewhere:
            marks = MARKS[cell.launcher] + ([] if is_sample(cell) else [pytest.mark.matrix])
            yield pytest.param(cell, marks=marks, id=str(cell))


@pytest.mark.timeout(200)
@pytest.mark.parametrize("cell", list(parameters()))
def test_the_job_ends_as_it_should(cell: Cell, tmp_path: Path) -> None:
    outcome = driver.run(cell, tmp_path)
    if FOLDER:
        table.write(Path(FOLDER), cell, outcome.seconds, outcome.problems)
    assert set(outcome.problems) <= known(cell, busy=driver.busy() >= 2), (
        f"after {outcome.seconds:.1f} s:\n{outcome.output}"
    )


def test_the_samples_are_of_every_kind_and_of_every_moment() -> None:
    samples = [cell for cell in cells() if is_sample(cell)]
    for launcher in LAUNCHERS:
        assert {cell.moment for cell in samples if cell.launcher == launcher} == set(MOMENTS)
    for kind in KINDS:
        assert len({cell.launcher for cell in samples if cell.kind == kind.name}) >= len(LAUNCHERS) / 2


def test_every_fact_is_of_some_cell() -> None:
    for fact in FACTS:
        assert any(fact.holds(cell) for cell in cells()), fact


def test_the_tables_of_the_page_are_those_of_the_matrix() -> None:
    """Rows, columns and notes; the seconds are those of the machine that made them."""
    page = table.PAGE.read_text()
    made = page.partition(table.BEGIN)[2].partition(table.END)[0]
    assert made.partition("### Notes")[2] == table.tables({}).partition("### Notes")[2]
    rows = re.findall(r"^(### .*|\|.*)$", made, re.MULTILINE)
    expected = re.findall(r"^(### .*|\|.*)$", table.tables({}), re.MULTILINE)
    assert [row.split("|")[:2] for row in rows] == [row.split("|")[:2] for row in expected]
    assert "**fails**" not in made
    assert "not run" not in made
    for fact, cell, shown in ((fact, cell, shown) for cell, shown in cells_of(made).items() for fact in FACTS):
        assert fact.holds(cell) or f"({FACTS.index(fact) + 1})" not in shown


def cells_of(made: str) -> dict[Cell, str]:
    values = [value.strip() for row in re.findall(r"^\| \S.*$", made, re.MULTILINE) for value in row.split("|")[2:-1]]
    values = [value for value in values if value not in MOMENTS]
    return dict(zip(cells(), values, strict=True))
