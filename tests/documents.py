"""The scripts and commands of a page, run as they stand there: each prints what is written below it."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
SECONDS = 150

# Open MPI takes neither root nor more processes than cores without being told.
OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe",
}

# The prompt of one of several nodes, whose commands run at the same time.
ON_NODE = re.compile(r"^\(node\d\)\$ (.*)$", re.MULTILINE)


def scripts(page: str) -> dict[str, str]:
    """Blocks of Python, or of a shell script, by the file name in their first comment."""
    texts = re.findall(r"```(?:python|bash)\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    names = [re.search(r"^# (\S+)$", text, re.MULTILINE) for text in texts]
    return {name[1]: text for name, text in zip(names, texts, strict=True) if name}


def sessions(page: str) -> list[list[tuple[str, list[str]]]]:
    """Blocks of a console: commands, each with the lines that it prints."""
    blocks = re.findall(r"```console\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return [
        [together(block)]
        if ON_NODE.search(block)
        else [parted(part) for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
        for block in blocks
    ]


def parted(text: str) -> tuple[str, list[str]]:
    command, *printed = text.splitlines()
    return command, printed


def together(block: str) -> tuple[str, list[str]]:
    """The commands of all nodes as one, which succeeds if all do."""
    started = "".join(f'{command} & nodes="$nodes $!"; ' for command in ON_NODE.findall(block))
    waited = 'for node in $nodes; do wait "$node" || failed=1; done; [ -z "$failed" ]'
    return started + waited, ON_NODE.sub("", block).split("\n")


def offered(page: str) -> dict[str, str]:
    """What a page's ``pyproject.toml`` offers to idist: files, with the text of their entry points."""
    toml = "".join(re.findall(r"```toml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL))
    entries = re.findall(r'\[project\.entry-points\."(.*?)"\]\n(\S+) = "(\w+)(.*?)"', toml)
    return {f"{module}.py": f"[{group}]\n{name} = {module}{what}\n" for group, name, module, what in entries}


def install(offers: dict[str, str], folder: Path) -> None:
    """Let scripts that are run in this folder find what is offered, as pip would."""
    for number, text in enumerate(offers.values()):
        installed = folder / f"offered{number}-1.0.dist-info"
        installed.mkdir()
        (installed / "METADATA").write_text(f"Metadata-Version: 2.4\nName: offered{number}\nVersion: 1.0\n")
        (installed / "entry_points.txt").write_text(text)


def here(command: str) -> str:
    """The same command where all nodes are this machine, with a port that is free."""
    with socket.socket() as sock:
        sock.bind(("", 0))
        port = sock.getsockname()[1]
    return re.sub(r"\bnode\d\b", "127.0.0.1", command).replace("29500", str(port))


def run(command: str, folder: Path) -> tuple[list[str], str]:
    """The lines of standard output, and what came on standard error; with the programs of this environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | OPEN_MPI
    variables["PATH"] = path
    ended = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines(), ended.stderr
