"""`idist run`, for real: what it executes, shows, writes and refuses."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from idist.cli import main, run
from idist.launchers.commands import PYTHON, SRUN, TORCHRUN, Request

EXAMPLES = Path(__file__).parents[2] / "examples"
LAUNCHED = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID")
TORCHELASTIC = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def not_launched(monkeypatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "show.py"
    path.write_text("import json, os, sys\nprint(json.dumps([sys.argv[1:], os.environ.get('RANK')]) + '\\n', end='')\n")
    return path


def idist(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "idist", *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_runs_an_example_on_two_processes() -> None:
    done = idist("run", "--nproc", 2, EXAMPLES / "reduction.py")
    assert done.returncode == 0, done.stderr
    assert sorted(line.partition("] ")[2] for line in done.stdout.splitlines()) == [
        "process 0/2 has data tensor([2.])",
        "process 1/2 has data tensor([2.])",
    ]


@pytest.mark.parametrize("options", [(), ("--nproc", 1)], ids=["python", "torchrun"])
def test_all_after_the_script_is_the_scripts(script: Path, options) -> None:
    done = idist("run", *options, script, "--nproc", "3", "--dry-run", "--", "-x", "a b")
    assert done.returncode == 0, done.stderr
    rank = '"0"' if options else "null"
    assert done.stdout == f'[["--nproc", "3", "--dry-run", "--", "-x", "a b"], {rank}]\n'


def test_exit_code_and_signals_are_the_tools(tmp_path) -> None:
    """It becomes the tool: no process of ours stays in between."""
    (tmp_path / "parent.py").write_text("import os, sys\nprint(os.getppid())\nsys.exit(7)\n")
    done = idist("run", tmp_path / "parent.py")
    assert (done.returncode, done.stdout.strip()) == (7, str(os.getpid()))


def test_what_a_dry_run_prints_can_be_executed(script: Path) -> None:
    shown = idist("run", "--dry-run", "--nproc", 1, script, "a b", "$HOME")
    assert shown.returncode == 0, shown.stderr
    done = subprocess.run(["bash", "-c", shown.stdout], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == '[["a b", "$HOME"], "0"]\n'


def test_a_dry_run_needs_neither_tool_nor_script(capsys, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["run", "--horovod", "--nproc", "2", "--dry-run", "no such.py"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"horovodrun -np 2 {shlex.quote(sys.executable)} 'no such.py'\n"
    assert "horovodrun is neither beside this Python nor on PATH" in printed.err


def test_writes_a_batch_script_once(script: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["run", "--sbatch", "job.sh", "--nproc", "2", "show.py"]
    assert main([*arguments[:1], "--dry-run", *arguments[1:]]) == 0
    shown = capsys.readouterr().out
    assert not Path("job.sh").exists()
    assert main(arguments) == 0
    assert Path("job.sh").read_text() == shown
    assert "sbatch job.sh" in capsys.readouterr().err
    Path("job.sh").write_text("edited")
    assert main(arguments) == 2
    assert Path("job.sh").read_text() == "edited"


def test_the_batch_script_runs_its_command_where_it_was_written(script: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--sbatch", "job.sh", "--nproc", "2", "show.py", "it's"]) == 0
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text('#!/bin/bash\nshift\nexec "$@"\n')
    (tmp_path / "bin" / "srun").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(tmp_path / "job.sh")],
        cwd="/",
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == '[["it\'s"], null]\n'


@pytest.mark.parametrize(
    ("env", "asked", "tool"),
    [
        ({}, {}, PYTHON),
        ({}, {"nproc": 2}, TORCHRUN),
        ({"SLURM_JOB_ID": "7"}, {}, SRUN),
        ({"SLURM_JOB_ID": "7"}, {"nproc": 2, "nnodes": 2}, SRUN),
        # Who places the nodes by hand has torchrun in mind.
        ({"SLURM_JOB_ID": "7"}, {"nproc": 2, "nnodes": 2, "node_rank": 0, "master": "a:1"}, TORCHRUN),
        # A half-set environment is no allocation's shell; the tool sets it anew.
        ({"SLURM_JOB_ID": "7", "RANK": "1"}, {"nproc": 2}, TORCHRUN),
    ],
)
def test_chooses_the_tool(env, asked, tool, capsys) -> None:
    assert run.choose(Request(script=("train.py",), **asked), env) is tool
    assert ("inside Slurm job 7: using srun" in capsys.readouterr().err) == (tool is SRUN)


def test_does_not_launch_twice(script: Path) -> None:
    done = idist("run", "--nproc", 2, script, **TORCHELASTIC)
    assert done.returncode == 1
    assert "torchelastic has started 2 processes already" in done.stderr
    assert idist("run", script, **TORCHELASTIC).stdout == '[[], "0"]\n'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "script"),
        (("--nproc", "0", "x.py"), "'0' is not a number of at least 1"),
        (("--nproc", "two", "x.py"), "'two' is not a number of at least 1"),
        (("--slurm", "--mpi", "x.py"), "not allowed with"),
        (("no_such.py",), "there is no script 'no_such.py'"),
        (("--slurm", "--node-rank", "1", "--dry-run", "x.py"), "--node-rank means nothing to srun"),
        (("--sbatch", "x.sh", "--torchrun", "--dry-run", "x.py"), "not for torchrun"),
        (("--sbatch", "x.sh", "--hosts", "a,b", "--dry-run", "x.py"), "--hosts means nothing to srun"),
    ],
)
def test_wrong_usage(arguments, message: str, capsys) -> None:
    try:
        code = main(["run", *arguments])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    assert message in capsys.readouterr().err
