"""mpiexec as a launcher for backends that are not MPI's own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest
from processes import free_port

from mpi import mpiexec

pytestmark = pytest.mark.mpi

PLACE = """
    idist.initialize("gloo", timeout=60)
    said = dict(
        environment=idist.runtime.current().topology.environment,
        world=idist.get_world_size(), local=idist.get_local_rank(), nproc=idist.get_nproc_per_node(),
        node=idist.get_node_rank(), nnodes=idist.get_nnodes(),
        gathered=idist.all_gather(idist.get_rank()), total=idist.all_reduce(1.5), text=idist.broadcast("é" * 500)[:1],
    )
"""


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped in a shell"])
def test_ranks_of_one_node_meet(tmp_path: Path, wrapped: bool) -> None:
    """KNOWN-FAILURES 19: `mpirun -np 2 python x.py` was two worlds of one, and the second died of its port."""
    ranks = mpiexec.said(PLACE, 3, tmp_path, wrapped=wrapped)
    assert sorted(rank["local"] for rank in ranks) == [0, 1, 2]
    for rank in ranks:
        assert (rank["environment"], rank["world"], rank["nproc"]) == ("mpi", 3, 3)
        assert (rank["node"], rank["nnodes"]) == (0, 1)
        assert (rank["gathered"], rank["total"], rank["text"]) == ([0, 1, 2], 4.5, "é")


def test_jobs_side_by_side_do_not_meet(tmp_path: Path) -> None:
    """KNOWN-FAILURES 19: two jobs that start at once on one machine keep to themselves."""
    script = tmp_path / "job.py"
    script.write_text(
        "import sys, idist\nidist.initialize('gloo', timeout=60)\n"
        "jobs = idist.all_gather(sys.argv[1])\nassert jobs == [sys.argv[1]] * 2, jobs\nidist.barrier()\n"
    )
    with contextlib.ExitStack() as stack:
        jobs = []
        for name in ("one", "other"):
            words = [*mpiexec.command(2), sys.executable, str(script), name]
            job = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
            stack.enter_context(job)
            stack.callback(job.kill)
            jobs.append(job)
        for job in jobs:
            _, errors = job.communicate(timeout=90)
            assert job.returncode == 0, errors


def test_an_address_of_the_user_counts(tmp_path: Path) -> None:
    ranks = mpiexec.said(PLACE, 2, tmp_path, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    assert [rank["gathered"] for rank in ranks] == [[0, 1], [0, 1]]


@pytest.mark.skipif(mpiexec.IS_OPEN_MPI, reason="Open MPI takes two names of one host for one node")
def test_several_nodes_learn_the_address_by_mpi(tmp_path: Path) -> None:
    """localhost and 127.0.0.1 are two hosts for Hydra: no rank sees from its variables that they are one."""
    ranks = mpiexec.said(PLACE, 2, tmp_path, hosts="localhost,127.0.0.1")
    assert [rank["gathered"] for rank in ranks] == [[0, 1], [0, 1]]
    assert [rank["local"] for rank in ranks] == [0, 1], "the ranks exchanged their hosts, which are one"


@pytest.mark.skipif(mpiexec.IS_OPEN_MPI, reason="Open MPI takes two names of one host for one node")
def test_without_mpi4py_several_nodes_are_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("raise ImportError('not here')")
    ended = mpiexec.run(PLACE, 2, tmp_path, hosts="localhost,127.0.0.1")
    assert ended.returncode != 0
    assert "MASTER_ADDR" in ended.stderr
    assert "pip install mpi4py" in ended.stderr


def test_processes_are_not_started_twice(tmp_path: Path) -> None:
    """KNOWN-FAILURES 18, with mpiexec as the launcher."""
    script = """
        with idist.Parallel(backend="gloo", nproc_per_node=2) as parallel:
            parallel.run(print)
    """
    ended = mpiexec.run(script, 2, tmp_path)
    assert ended.returncode != 0
    assert "mpi has started 2 already" in ended.stderr


def test_parallel_attaches(tmp_path: Path) -> None:
    script = """
        def training(local_rank, factor):
            return [local_rank, factor * idist.all_reduce(1)]

        with idist.Parallel(backend="gloo") as parallel:
            said = parallel.run(training, 10)
            rank = idist.get_rank()
        idist.get_rank = lambda: rank
    """
    ranks = mpiexec.said(script, 2, tmp_path)
    assert sorted(ranks) == [[[0, 20]], [[1, 20]]]
