"""Every command of examples/README.md and of docs/comparison.md, run as it stands there: it prints what is written.

Hosts, ports, process ids, times, paths and the order of lines aside. All nodes are this machine, unless Slurm is there.
"""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet

ROOT = Path(__file__).parents[2]
README = (ROOT / "examples" / "README.md").read_text()
COMPARISON = (ROOT / "docs" / "comparison.md").read_text()
BLOCKS = re.findall(r"```console\n(.*?)```", README + COMPARISON, re.DOTALL)
COMMAND = re.compile(r"^(?:\((?P<node>\w+)\))?\$ (?P<command>.*)$")

# Programs that pip does not bring along, and the mark of the suite that has them.
MARKS = {
    r"\b(srun|sbatch|salloc)\b|--slurm\b": pytest.mark.slurm,
    r"\bmpiexec\b|--mpi\b": pytest.mark.mpi,
    r"horovod": pytest.mark.horovod,
}

ASIDE = (
    (r"\[http://[\w.-]+:\d+\]", "[MASTER]"),
    (r"hello from \[[\w.-]+:", "hello from [HOST:"),
    (r"^(\d+) +[\w.-]+ +\d+ +(\w+) +(right) +[\d.]+ ms", r"\1 HOST PID \2 \3 TIME"),  # a rank of `idist check`
    (r"met in [\d.]+ s", "met in TIME"),
    (r"accuracy [\d.]+$", "accuracy NUMBER"),
    (r"Submitted batch job \d+", "Submitted batch job ID"),
    (r"^cd .+ \|\| exit", "cd DIRECTORY || exit"),
    (r"\S+/python ", "PYTHON "),
    (r" +", " "),
)


def parsed(block: str) -> tuple[dict[str | None, str], list[str]]:
    """The commands of each node, as a script, and the lines that they print."""
    scripts: dict[str | None, str] = {}
    printed = []
    for line in block.splitlines():
        if match := COMMAND.match(line):
            scripts[match["node"]] = scripts.get(match["node"], "") + match["command"] + "\n"
        else:
            printed.append(line)
    return scripts, printed


def marked(block: str) -> ParameterSet:
    scripts, _ = parsed(block)
    text = "".join(scripts.values())
    name = re.sub(r"examples/|\.py|--|[^\w. -]", "", text.strip().replace("\n", " then "))[:80]
    marks = [mark for program, mark in MARKS.items() if re.search(program, text)]
    return pytest.param(block, id=name, marks=[pytest.mark.slow, *marks])


def comparable(lines: list[str]) -> list[str]:
    stripped = [line.strip() for line in lines if line.strip()]
    for pattern, general in ASIDE:
        stripped = [re.sub(pattern, general, line) for line in stripped]
    return sorted(stripped)


def here(script: str, port: int) -> str:
    """The same commands where we are: on two nodes of a cluster if there is one, else on this machine alone."""
    nodes = ["127.0.0.1"] * 2
    if re.search(r"\bsrun\b", script):
        listed = subprocess.run(["sinfo", "-h", "-N", "-o", "%N"], capture_output=True, text=True, check=True)
        nodes = sorted(set(listed.stdout.split()))
    script = script.replace("mycluster025", nodes[0]).replace("mycluster026", nodes[1])
    return re.sub(r"\b29500\b", str(port), script)


@pytest.fixture
def variables(tmp_path: Path) -> dict[str, str]:
    """An environment in which ``python``, ``torchrun`` and ``idist`` are those of the Python that runs this."""
    programs = {"python": "", "torchrun": "-m torch.distributed.run", "idist": "-m idist"}
    (tmp_path / "bin").mkdir()
    for name, arguments in programs.items():
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        program.chmod(0o755)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    one = {"OMP_NUM_THREADS": "1"}  # without idist each process would take all cores
    return {**os.environ, **one, "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.timeout(240)
@pytest.mark.parametrize("block", [marked(block) for block in BLOCKS])
def test_prints_what_is_written(block: str, tmp_path: Path, variables: dict[str, str], port: int) -> None:
    scripts, written = parsed(block)
    assert scripts
    shells = [
        subprocess.Popen(
            ["bash", "-e", "-c", here(script, port)],
            cwd=tmp_path,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for script in scripts.values()
    ]
    printed = []
    try:
        for shell in shells:
            output, errors = shell.communicate(timeout=200)
            assert shell.returncode == 0, errors
            printed += output.splitlines()
    finally:
        for shell in shells:
            if shell.poll() is None:
                os.killpg(shell.pid, signal.SIGTERM)
                shell.communicate(timeout=10)
    if "..." in written:
        written.remove("...")
        assert set(comparable(written)) <= set(comparable(printed))
    else:
        assert comparable(printed) == comparable(written)


def test_every_example_is_listed() -> None:
    names = {path.relative_to(ROOT / "examples") for path in (ROOT / "examples").rglob("*.py")}
    assert names == {Path(link) for link in re.findall(r"\]\(([\w/]+\.py)\)", README)}
