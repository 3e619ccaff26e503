"""A rank that does not come: the report of the others, and the error of the timeout that carries it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpi import mpiexec

pytestmark = pytest.mark.mpi

SCRIPT = """
import time, torch
with idist.Parallel("mpi", timeout=6, warn_after=1) as parallel:
    def training(local_rank):
        if idist.get_rank() == 1:
            time.sleep(30)
        idist.all_reduce(torch.ones(2, 3))
    parallel.run(training)
"""


def test_a_rank_does_not_come(tmp_path: Path) -> None:
    job = mpiexec.run(SCRIPT, 2, tmp_path)  # one that waits: what two show mixes
    assert job.returncode != 0
    report, _, error = job.stderr.partition(" timed out after 6 s")
    for said in (report, error):
        assert "idist: 1 of 2 ranks wait, for 1 s now; rank 1 has not come." in said
        assert "    rank 0: all_reduce of float32 2x3 with SUM (number 1 of its group), at " in said
        assert " in training: time.sleep(30)" in said
