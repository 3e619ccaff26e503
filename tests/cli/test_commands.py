"""The command lines that `idist run` builds, tool by tool."""

import shlex
import sys

import pytest

from idist.errors import ConfigError, LaunchError
from idist.launchers.commands import PYTHON, SRUN, TOOLS, TORCHRUN, Command, Request, batch_script
from idist.launchers.commands.horovod import Horovodrun
from idist.launchers.commands.mpi import Mpiexec

SCRIPT = ("train.py", "lr")
RUN = (sys.executable, *SCRIPT)
TORCH = (sys.executable, "-m", "torch.distributed.run")


def request(**asked) -> Request:
    return Request(script=SCRIPT, **asked)


def test_one_process_is_plain_python() -> None:
    assert PYTHON.checked(request(), {}).argv == RUN


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({"nproc": 4}, "--standalone --nproc-per-node=4"),
        ({"nnodes": 1, "nproc": 4}, "--standalone --nproc-per-node=4"),
        (
            {"nproc": 4, "nnodes": 2, "node_rank": 1, "master": "node1:29500"},
            "--nnodes=2 --node-rank=1 --master-addr=node1 --master-port=29500 --nproc-per-node=4",
        ),
        (
            {"nnodes": 1, "node_rank": 0, "master": "[fe80::1]:29500"},
            "--nnodes=1 --node-rank=0 --master-addr=fe80::1 --master-port=29500 --nproc-per-node=1",
        ),
    ],
)
def test_torchrun(asked, options: str) -> None:
    assert TORCHRUN.checked(request(**asked), {}).argv == (*TORCH, *options.split(), *SCRIPT)


def test_options_of_the_script_are_kept_from_torchrun() -> None:
    asked = Request(script=("train.py", "--nproc", "3"), nproc=2)
    assert TORCHRUN.checked(asked, {}).argv[-4:] == ("--", "train.py", "--nproc", "3")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"nnodes": 2}, "need --nnodes, --node-rank, the index of this node, and --master"),
        ({"node_rank": 0, "master": "a:1"}, "need --nnodes"),
        ({"nnodes": 2, "node_rank": 2, "master": "a:1"}, "--node-rank is 0 to 1 with --nnodes 2"),
        (
            {"nnodes": 2, "node_rank": 0, "master": "node1"},
            "--master is host:port, for example node1:29500; got 'node1'",
        ),
        ({"nnodes": 2, "node_rank": 0, "master": "node1:http"}, "--master is host:port"),
        (
            {"hosts": ("a", "b")},
            "--hosts means nothing to torchrun, which takes --master, --nnodes, --node-rank, --nproc",
        ),
    ],
)
def test_torchrun_refuses(asked, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TORCHRUN.checked(request(**asked), {})


@pytest.mark.parametrize(
    ("asked", "env", "options"),
    [
        ({}, {}, ""),
        ({"nproc": 4}, {}, "--nodes=1 --ntasks=4 --ntasks-per-node=4"),
        ({"nproc": 4, "nnodes": 2}, {}, "--nodes=2 --ntasks=8 --ntasks-per-node=4"),
        ({"nnodes": 2}, {}, "--nodes=2"),
        # The allocation's nodes, all of them; its number of tasks would outdo the one per node.
        ({"nproc": 4}, {"SLURM_JOB_NUM_NODES": "3"}, "--nodes=3 --ntasks=12 --ntasks-per-node=4"),
        ({"nproc": 4, "nnodes": 2}, {"SLURM_JOB_NUM_NODES": "3"}, "--nodes=2 --ntasks=8 --ntasks-per-node=4"),
        ({}, {"SLURM_JOB_NUM_NODES": "3"}, ""),
    ],
)
def test_srun(asked, env, options: str) -> None:
    command = SRUN.checked(request(**asked), env)
    assert command.argv == ("srun", *options.split(), "--kill-on-bad-exit=1", "--quit-on-interrupt", *RUN)
    assert "--kill-on-bad-exit=1" in command.notes[0]


def test_a_batch_script_runs_from_everywhere() -> None:
    asked = Request(script=("my train.py", "--tag", "a b"), nproc=4, nnodes=2)
    assert batch_script(asked, "/home/me/the project").splitlines() == [
        "#!/bin/bash",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks=8",
        "#SBATCH --ntasks-per-node=4",
        "",
        "cd '/home/me/the project' || exit",
        f"srun --kill-on-bad-exit=1 {shlex.quote(sys.executable)} 'my train.py' --tag 'a b'",
    ]


def test_mpiexec_of_the_hydra_family() -> None:
    assert Mpiexec().hydra(request(nproc=4)) == Command(("mpiexec", "-n", "4", *RUN))
    over_nodes = Mpiexec().hydra(request(nproc=4, hosts=("a", "b")))
    assert over_nodes == Command(("mpiexec", "-n", "8", "-hosts", "a,b", "-ppn", "4", *RUN))


@pytest.mark.parametrize(
    ("nproc", "root", "env", "options"),
    [
        (4, False, {}, ""),
        (4, True, {}, "--allow-run-as-root"),
        (4, True, {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}, ""),
        (4, True, {"OMPI_ALLOW_RUN_AS_ROOT": "1"}, "--allow-run-as-root"),
        (5, False, {}, "--oversubscribe"),
        (5, True, {}, "--allow-run-as-root --oversubscribe"),
    ],
)
def test_open_mpi_is_given_what_it_needs_and_no_more(nproc: int, root: bool, env, options: str) -> None:
    command = Mpiexec().open_mpi(request(nproc=nproc), env, root=root, cores=4)
    assert command.argv == ("mpiexec", *options.split(), "-n", str(nproc), *RUN)
    assert [any(option in note for note in command.notes) for option in options.split()] == [True] * len(command.notes)


def test_open_mpi_over_nodes() -> None:
    command = Mpiexec().open_mpi(request(nproc=4, hosts=("a", "b")), {}, root=False, cores=4)
    assert command.argv == ("mpiexec", "-n", "8", "--host", "a:4,b:4", *RUN)


def test_horovodrun() -> None:
    assert Horovodrun().checked(request(nproc=4), {}).argv == ("horovodrun", "-np", "4", *RUN)
    over_nodes = Horovodrun().checked(request(nproc=4, hosts=("a", "b")), {})
    assert over_nodes.argv == ("horovodrun", "-np", "8", "-H", "a:4,b:4", *RUN)


@pytest.mark.parametrize("tool", [Mpiexec(), Horovodrun()], ids=lambda tool: tool.flag)
def test_some_have_to_be_told_how_many(tool) -> None:
    with pytest.raises(ConfigError, match=f"{tool.program} needs --nproc"):
        tool.checked(request(), {})


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool is not TORCHRUN], ids=lambda tool: tool.flag)
def test_a_missing_tool_says_where_it_comes_from(tool, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(LaunchError) as raised:
        tool.found(Command((tool.program, "x")), {"PATH": str(tmp_path)})
    assert str(raised.value) == f"{tool.program} is neither beside this Python nor on PATH. {tool.source}"


def test_the_tool_beside_this_python_counts(tmp_path, monkeypatch) -> None:
    """Two MPIs on one machine do not understand each other."""
    for directory in ("system", "venv"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "mpiexec").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    beside = str(tmp_path / "venv" / "mpiexec")
    command = Command(("mpiexec", "-n", "2"))
    assert Mpiexec().found(command, {"PATH": str(tmp_path / "system")}).argv == (beside, "-n", "2")
    assert Mpiexec().found(command, {"PATH": str(tmp_path / "venv")}).argv == command.argv
