"""How a job ends when one of its ranks does: all of it, at once, with the reason; or not at all, where nobody waits."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpi import mpiexec

pytestmark = pytest.mark.mpi

SCRIPT = """
import sys, time
import torch, idist

def training(local_rank, ending, failing):
    tensor = torch.ones(4)
    for step in range(20):
        idist.all_reduce(tensor)
        if step == 10 and idist.get_rank() == failing:
            open("event", "w").write(str(time.time()))
            if ending == "raise":
                raise ValueError("boom")
            if ending.startswith("exit"):
                sys.exit(int(ending[4:]))
            if ending == "return":
                return

ending, failing, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if how == "bare":
    idist.initialize("mpi", timeout=60)
    training(0, ending, failing)
else:
    with idist.Parallel("mpi", timeout=60) as parallel:
        parallel.run(training, ending, failing)
"""

SAYS = {
    "raise": "ValueError: boom",
    "exit0": "rank {rank} ended without taking part",
    "return": "rank {rank} ended without taking part",
}
WITHIN_S = 5.0


def ended(folder: Path, script: str, *arguments: str, size: int = 2) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script)
    return subprocess.run(
        [*mpiexec.command(size), sys.executable, "script.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=90,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize(
    ("ending", "rank", "how"),
    [("raise", 0, "bare"), ("raise", 1, "bare"), ("exit0", 0, "Parallel"), ("exit0", 1, "bare"), ("return", 0, "bare")],
)
def test_all_end_with_the_first(tmp_path: Path, ending: str, rank: int, how: str) -> None:
    """What tests/matrix leaves out: rank 0, which serves the store, no Parallel, and ends that are no failures."""
    job = ended(tmp_path, SCRIPT, ending, str(rank), how)
    took = time.time() - float((tmp_path / "event").read_text())
    assert job.returncode != 0
    assert took < WITHIN_S, job.stderr
    assert SAYS[ending].format(rank=rank) in job.stderr


def test_mpi_that_cannot_start_ends_in_time(tmp_path: Path) -> None:
    """A rank failed before: MPICH waits for it for ever, and Open MPI's mpiexec ends all by itself."""
    script = """
import os, sys, idist
if os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == "1":
    sys.exit("no data")
idist.initialize("mpi", timeout=3)
"""
    begun = time.monotonic()
    job = ended(tmp_path, script)
    assert job.returncode != 0
    assert "no data" in job.stderr
    assert time.monotonic() - begun < 60
    assert mpiexec.IS_OPEN_MPI or "rank 0 of 2: MPI has not started within 3 s" in job.stderr


def test_who_is_needed_no_more_may_end(tmp_path: Path) -> None:
    """The others go on as long as they like."""
    script = """
import time, idist
idist.initialize("mpi", timeout=60)
idist.barrier()
if idist.get_rank() == 1:
    time.sleep(3)
    print("saved", idist.get_world_size(), flush=True)
"""
    job = ended(tmp_path, script, size=3)
    assert job.returncode == 0, job.stderr
    assert job.stdout.split() == ["saved", "3"]


def test_again_and_again(tmp_path: Path) -> None:
    script = """
import idist
for turn in range(5):
    idist.initialize("mpi", timeout=60)
    assert idist.all_reduce(turn) == turn * idist.get_world_size()
    assert idist.all_gather(idist.get_rank(), group=[0, 2]) == ([0, 2] if idist.get_rank() != 1 else 1)
    idist.finalize()
"""
    job = ended(tmp_path, script, size=3)
    assert job.returncode == 0, job.stderr


def test_who_never_comes_is_named(tmp_path: Path) -> None:
    script = """
import time, idist
from mpi4py import MPI
if MPI.COMM_WORLD.Get_rank() == 1:
    time.sleep(60)
idist.initialize("mpi", timeout=3)
"""
    begun = time.monotonic()
    job = ended(tmp_path, script, size=3)
    assert job.returncode != 0
    assert "never came: rank 1" in job.stderr
    assert time.monotonic() - begun < 30
