"""The commands of docs/backends/mpi.md, run as they stand there; what they print is what is written below them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mpi import mpiexec

pytestmark = pytest.mark.mpi

DOCUMENT = (Path(__file__).parents[2] / "docs" / "backends" / "mpi.md").read_text()
BLOCKS = re.findall(r"```console\n(.*?)```", DOCUMENT, re.DOTALL)
SCRIPTS = {
    text.partition("\n")[0].removeprefix("# "): text for text in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][2:])
def test_prints_what_is_written(tmp_path: Path, block: str) -> None:
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text)
    program, _, _, *options = mpiexec.command(4)
    programs = {"python": [sys.executable], "mpiexec": [program, *options]}
    (tmp_path / "bin").mkdir()
    for name, words in programs.items():
        file = tmp_path / "bin" / name
        file.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        file.chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), str(mpiexec.BIN), os.environ["PATH"]])
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"PATH": path}
    command, *printed = block.removeprefix("$ ").splitlines()
    ended = subprocess.run(
        ["sh", "-c", command],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=90,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 0, ended.stderr
    assert sorted(ended.stdout.splitlines()) == sorted(printed)
