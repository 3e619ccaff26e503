"""A warning of Slurm reaches the program as should_stop: all ranks save and leave in the same step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slurm.cluster import Job, python, submit, succeed, told, until

pytestmark = pytest.mark.slurm


def test_scancel_sends_usr1(tmp_path: Path) -> None:
    job = submit(tmp_path, f"srun {' '.join(python('steps.py', tmp_path))}", "-N2", "-n2")
    runs(job, tmp_path)
    succeed("scancel", "--signal=USR1", str(job.number))
    job.succeed()
    assert_saved(told(tmp_path), tmp_path, begun=0)


def test_requeue_goes_on_where_it_was_left(tmp_path: Path) -> None:
    """SIGTERM, and SLURM_RESTART_COUNT in the second run."""
    job = submit(tmp_path, f"srun {' '.join(python('steps.py', tmp_path))}", "-N2", "-n2", "--requeue")
    runs(job, tmp_path)
    succeed("scontrol", "requeue", str(job.number))
    until(lambda: len(told(tmp_path)) == 4, "the second run")
    first = [each for each in told(tmp_path) if each["restarts"] == 0]
    assert_saved(first, tmp_path, begun=0)
    second = [each for each in told(tmp_path) if each["restarts"] == 1]
    assert [(each["rank"], each["begun"], each["running"]) for each in second] == [
        (rank, first[0]["step"], True) for rank in (0, 1)
    ]
    succeed("scancel", "--signal=USR1", str(job.number))
    job.succeed()
    second = [each for each in told(tmp_path) if each["restarts"] == 1]
    assert_saved(second, tmp_path, begun=first[0]["step"])


def runs(job: Job, folder: Path) -> None:
    until(lambda: len(told(folder)) == 2, f"both tasks of job {job.number} run")


def assert_saved(said: list[dict[str, Any]], folder: Path, begun: int) -> None:
    assert [each["rank"] for each in said] == [0, 1]
    assert [(each["stop"], each["running"], each["begun"]) for each in said] == [(True, False, begun)] * 2
    assert said[0]["step"] == said[1]["step"] > begun
