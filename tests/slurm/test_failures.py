"""One task fails: what becomes of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from slurm.cluster import Ended, python, run, told

pytestmark = pytest.mark.slurm

SOON_S = 60.0  # the collectives have 120 s


def test_one_task_fails_and_srun_ends_the_others(tmp_path: Path) -> None:
    """KNOWN-FAILURES 25: as `srun --kill-on-bad-exit` promises, also while they compute."""
    ended = fails(tmp_path, "compute", "--kill-on-bad-exit")
    assert "node1: tasks 0-1: Terminated" in ended.err


def test_one_task_fails_and_the_others_hear_of_it(tmp_path: Path) -> None:
    """KNOWN-FAILURES 25: srun alone lets them run on, until they need the one that is gone."""
    ended = fails(tmp_path, "collective")
    assert ended.err.count("Traceback (most recent call last)") == 2


def fails(folder: Path, meanwhile: str, *options: str) -> Ended:
    ended = run("srun", *options, "-w", "node[1-2]", "-n3", *python("fail.py", folder, meanwhile))
    assert [(each["rank"], each["host"]) for each in told(folder)] == [(0, "node1"), (1, "node1")]
    assert ended.code != 0
    assert "node2: task 2: Exited with exit code 3" in ended.err
    assert ended.seconds < SOON_S
    return ended
