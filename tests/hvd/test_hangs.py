"""A rank that does not come: the report of the others, and the error of the timeout that carries it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvd import horovodrun

pytestmark = pytest.mark.horovod

SCRIPT = """
import time
with idist.Parallel("horovod", timeout=6, warn_after=1) as parallel:
    def training(local_rank):
        if idist.get_rank() == 1:
            time.sleep(30)
        idist.all_reduce(torch.ones(2, 3))
    parallel.run(training)
"""


def test_a_rank_does_not_come(tmp_path: Path) -> None:
    job = horovodrun.run(SCRIPT, 2, tmp_path)
    assert job.returncode != 0
    shown = job.stdout + job.stderr
    report, _, error = shown.partition("PeerFailed: a collective timed out")
    for said in (report, error):
        assert "idist: 1 of 2 ranks wait, for 1 s now; rank 1 has not come." in said
        assert "    rank 0: all_reduce of float32 2x3 with SUM (number 1 of its group), at " in said
        assert " in training: time.sleep(30)" in said
