"""However srun spreads the tasks, each knows its place, and all of them meet."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from slurm.cluster import python, submit, succeed, told

pytestmark = pytest.mark.slurm

# The command, and the host of each rank. PLACE is the program; what follows a colon is another part of the same step.
PLACEMENTS = {
    "even": ("srun -N2 --ntasks-per-node=2 PLACE", "node1 node1 node2 node2"),
    "uneven": ("srun -N2 -n3 PLACE", "node1 node1 node2"),
    "cyclic": ("srun -N2 -n3 --distribution=cyclic PLACE", "node1 node2 node1"),
    "four nodes, five tasks": ("srun -N4 -n5 PLACE", "node1 node1 node2 node3 node4"),
    "plane": ("srun -N3 -n7 --distribution=plane=2 PLACE", "node1 node1 node2 node3 node1 node1 node1"),
    "relative": ("salloc -Q -N4 srun -r2 -N2 PLACE", "node3 node4"),
    "heterogeneous": (
        "srun -w node[1-2] --ntasks-per-node=2 PLACE : -w node3 --ntasks-per-node=1 PLACE",
        "node1 node1 node2 node2 node3",
    ),
    "heterogeneous, in unusual order": (
        "srun -w node3 --ntasks-per-node=1 PLACE : -w node[1-2] --ntasks-per-node=1 PLACE",
        "node3 node1 node2",
    ),
    # No variable tells node3 that rank 0 is not on node1.
    "heterogeneous step of a plain job, in unusual order": (
        "salloc -Q -N3 -n4 srun -w node2 -n1 PLACE : -w node1 -n2 PLACE : -w node3 -n1 PLACE",
        "node2 node1 node1 node3",
    ),
}
HOSTFILES = ("node2 node1", "node3 node1 node2", "node4 node2 node2 node4 node1")


@pytest.mark.parametrize(("command", "hosts"), PLACEMENTS.values(), ids=PLACEMENTS)
def test_placement(tmp_path: Path, command: str, hosts: str) -> None:
    """KNOWN-FAILURES 10, 20."""
    succeed(*shlex.split(command.replace("PLACE", shlex.join(python("place.py", tmp_path)))))
    assert_placed(told(tmp_path), hosts.split())


@pytest.mark.parametrize("hosts", HOSTFILES)
def test_a_hostfile_puts_rank_0_anywhere(tmp_path: Path, hosts: str) -> None:
    """KNOWN-FAILURES 20: of three nodes or more, no task but its neighbours knows where rank 0 is."""
    (tmp_path / "hosts").write_text(hosts.replace(" ", "\n") + "\n")
    tasks = str(len(hosts.split()))
    succeed("srun", "-n", tasks, *python("place.py", tmp_path), env={"SLURM_HOSTFILE": str(tmp_path / "hosts")})
    assert_placed(told(tmp_path), hosts.split())


@pytest.mark.parametrize("scontrol", ["missing", "failing"])
def test_scontrol_is_not_needed(tmp_path: Path, scontrol: str) -> None:
    """KNOWN-FAILURES 20: a compute node may have no slurmctld to ask, or not even the command."""
    programs = tmp_path / "programs"
    programs.mkdir()
    if scontrol == "failing":
        (programs / "scontrol").write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
        (programs / "scontrol").chmod(0o755)
    succeed("srun", "-N2", "-n3", "env", f"PATH={programs}", *python("place.py", tmp_path))
    assert_placed(told(tmp_path), ["node1", "node1", "node2"])


def test_steps_of_one_job_side_by_side(tmp_path: Path) -> None:
    """KNOWN-FAILURES 20: each meets its own tasks."""
    steps = [tmp_path / "first", tmp_path / "second"]
    for step in steps:
        step.mkdir()
    commands = " ".join(f"srun --exact -N2 -n2 {' '.join(python('place.py', step))} &" for step in steps)
    succeed("salloc", "-Q", "-N2", "-n4", "bash", "-c", f"{commands} wait -n && wait -n")
    for step in steps:
        assert_placed(told(step), ["node1", "node2"])
    tokens = {each["topology"]["job_token"] for step in steps for each in told(step)}
    assert len(tokens) == 2


def test_array(tmp_path: Path) -> None:
    """The tasks of an array are jobs of their own."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    job = submit(
        tmp_path, f"srun {' '.join(python('place.py', tmp_path))}/$SLURM_ARRAY_TASK_ID", "-N2", "-n2", "--array=0-1"
    )
    job.wait()
    for folder in folders:
        assert_placed(told(folder), ["node1", "node2"])


def assert_placed(said: Sequence[dict[str, Any]], hosts: Sequence[str]) -> None:
    """What the processes say of themselves, held against where they really ran."""
    assert [each["rank"] for each in said] == list(range(len(hosts))), said
    assert [each["host"] for each in said] == list(hosts), "srun placed the tasks otherwise than this test thinks"
    per_host = Counter(hosts)
    for each in said:
        assert each["topology"]["environment"] == "slurm"
        assert each["world_size"] == len(hosts)
        assert each["nnodes"] == len(per_host)
        assert each["nproc_per_node"] == per_host[each["host"]]
        assert each["local_rank"] == hosts[: each["rank"]].count(each["host"])
        assert each["ranks"] == list(range(len(hosts)))
        assert each["hosts"] == list(hosts)
        assert each["jobs"] == [each["jobs"][0]] * len(hosts)
        assert each["total"] == 2 ** len(hosts) - 1
    nodes = {(each["node_rank"], each["host"]) for each in said}
    assert sorted(node for node, _ in nodes) == list(range(len(per_host))), "one number for each host"
