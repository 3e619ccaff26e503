"""KNOWN-FAILURES 25, whole: whatever fails, and whenever, the job ends in time, says why, and leaves nothing.

Some cells run every time; ``make failures`` runs them all and writes the tables of docs/failures.md.
"""

from __future__ import annotations

import os
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
    assert set(outcome.problems) <= set(known(cell)), f"after {outcome.seconds:.1f} s:\n{outcome.output}"


def test_the_samples_are_of_every_kind_and_of_every_moment() -> None:
    for launcher in LAUNCHERS:
        samples = [cell for cell in cells() if cell.launcher == launcher and is_sample(cell)]
        assert {cell.kind for cell in samples} == {kind.name for kind in KINDS}
        assert {cell.moment for cell in samples} == set(MOMENTS)


def test_every_fact_is_of_some_cell() -> None:
    for fact in FACTS:
        assert any(fact.holds(cell) for cell in cells()), fact
