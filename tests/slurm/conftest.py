"""The cluster has to be there, and every test has to end the jobs that it started."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from slurm.cluster import jobs, run, succeed, until

GRACE_S = 10.0


@pytest.fixture(scope="session", autouse=True)
def cluster() -> None:
    idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
    if not os.environ.get("SLURM_CONF") or subprocess.run(idle, capture_output=True, check=False).stdout != b"4\n":
        pytest.fail("there is no cluster of four idle nodes: run these tests with `make test-slurm`", pytrace=False)


@pytest.fixture(autouse=True)
def ends_its_jobs() -> Iterator[None]:
    before = set(jobs())

    def left() -> set[str]:
        return set(jobs()) - before

    yield
    try:
        until(lambda: not left(), "the end of the jobs of the test", GRACE_S)
    except AssertionError:
        queue = succeed("squeue").out
        run("scancel", "--full", "--signal=KILL", *left())
        run("scancel", *left())  # those that wait
        until(lambda: not left(), "the end of the jobs that a test left")
        raise AssertionError(f"the test left jobs:\n{queue}") from None
