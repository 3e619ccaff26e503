"""The scripts and commands of a page, run as they stand there: each prints what is written below it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
SECONDS = 90


def scripts(page: str) -> dict[str, str]:
    """Blocks of Python by the file name in their first line."""
    texts = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return {text.partition("\n")[0].removeprefix("# "): text for text in texts}


def sessions(page: str) -> list[list[tuple[str, list[str]]]]:
    """Blocks of a console: commands, each with the lines that it prints."""
    blocks = re.findall(r"```console\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return [[parted(part) for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]] for block in blocks]


def parted(text: str) -> tuple[str, list[str]]:
    command, *printed = text.splitlines()
    return command, printed


def run(command: str, folder: Path) -> tuple[list[str], str]:
    """The lines of standard output, and what came on standard error; with the programs of this environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"PATH": path}
    ended = subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines(), ended.stderr
