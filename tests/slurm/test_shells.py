"""What Slurm starts without srun is one process; and srun may start a launcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slurm.cluster import assert_says, python, submit, succeed, told

pytestmark = pytest.mark.slurm

HINT = "not started by srun"
AT_ONCE_S = 40.0  # an import of torch on a machine that is busy; ranks that are waited for have 60 s


def test_sbatch(tmp_path: Path) -> None:
    """KNOWN-FAILURES 27: the batch script itself is one process, srun in it starts the job's."""
    folders = {name: tmp_path / name for name in ("plain", "srun")}
    for folder in folders.values():
        folder.mkdir()
    plain, srun = (" ".join(python("place.py", folder)) for folder in folders.values())
    written = submit(tmp_path, f"{plain}\nsrun {srun}", "-N2", "--ntasks-per-node=2").succeed()
    assert_alone(told(folders["plain"]))
    assert_says(written, HINT, "running one process")
    assert [each["host"] for each in told(folders["srun"])] == ["node1", "node1", "node2", "node2"]
    assert {each["world_size"] for each in told(folders["srun"])} == {4}
    assert written.count(HINT) == 1, "the tasks of srun need no hint"


def test_salloc(tmp_path: Path) -> None:
    """KNOWN-FAILURES 27: an interactive shell of an allocation, here on the login node."""
    ended = succeed("salloc", "-Q", "-N2", "-n4", *python("place.py", tmp_path))
    assert_alone(told(tmp_path), host="ctl")
    assert_says(ended.err, HINT)
    assert ended.seconds < AT_ONCE_S


def test_srun_pty(tmp_path: Path) -> None:
    """KNOWN-FAILURES 27: an interactive shell as task 0 of four, of which the others have no terminal to read from."""
    (tmp_path / "typed").write_text(f"{' '.join(python('place.py', tmp_path))}\nexit\n")
    terminal = ["script", "--quiet", "--return", "--command", "srun -N2 -n4 --pty bash --norc", "/dev/null"]
    with (tmp_path / "typed").open() as typed:
        ended = succeed(*terminal, stdin=typed)
    assert_alone(told(tmp_path))
    assert HINT in ended.out
    assert ended.seconds < AT_ONCE_S


def test_one_task_needs_no_hint(tmp_path: Path) -> None:
    ended = succeed("salloc", "-Q", "-n1", *python("place.py", tmp_path))
    assert_alone(told(tmp_path), host="ctl")
    assert ended.err == ""


def test_srun_torchrun(tmp_path: Path) -> None:
    """KNOWN-FAILURES 9: torchrun's variables win, also for a process group that the script made by hand."""
    torchrun = [*python("by_hand.py")[:1], "-m", "torch.distributed.run"]
    agents = ["--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=node1:29400", "--rdzv-id=7"]
    script = python("by_hand.py", tmp_path)[1:]
    succeed("srun", "-N2", "--ntasks-per-node=1", *torchrun, *agents, *script)
    said = told(tmp_path)
    assert [each["rank"] for each in said] == [0, 1, 2, 3]
    for each in (*said, *(each["by_hand"] for each in said)):
        assert (each["world_size"], each["nnodes"], each["nproc_per_node"]) == (4, 2, 2)
        assert each["local_rank"] == each["rank"] % 2
        assert each["node_rank"] == each["rank"] // 2
        assert each["ranks"] == [0, 1, 2, 3]
    assert {each["topology"]["environment"] for each in said} == {"torchelastic"}
    assert {(each["node_rank"], each["host"]) for each in said} in (
        {(0, "node1"), (1, "node2")},
        {(0, "node2"), (1, "node1")},
    )


def assert_alone(said: list[dict[str, Any]], host: str = "node1") -> None:
    (alone,) = said
    assert (alone["world_size"], alone["topology"]["environment"], alone["host"]) == (1, "serial", host)
