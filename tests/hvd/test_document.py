"""The commands of docs/backends/horovod.md, run as they stand there; what they print is what is written below them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hvd import horovodrun

pytestmark = pytest.mark.horovod

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "backends" / "horovod.md").read_text()
BLOCKS = re.findall(r"```console\n(.*?)```", DOCUMENT, re.DOTALL)
INSTALL = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)
SCRIPTS = {
    text.partition("\n")[0].removeprefix("# "): text for text in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
}


def run(command: str, folder: Path) -> list[str]:
    variables = horovodrun.environment(OMP_NUM_THREADS="1")
    variables.pop("PYTHONUNBUFFERED", None)
    ended = subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=100,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout.splitlines()


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][2:])
def test_prints_what_is_written(tmp_path: Path, block: str) -> None:
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text)
    command, *printed = block.removeprefix("$ ").splitlines()
    assert sorted(run(command, tmp_path)) == sorted(printed)


@pytest.mark.parametrize("command", INSTALL)
def test_installs(command: str) -> None:
    """The wheel that this environment was made with: it is kept, so nothing is built again."""
    said = run(command.strip(), ROOT)
    assert any("horovod is already installed" in line for line in said), said


def test_the_wheel_is_kept_by_what_it_depends_on(tmp_path: Path) -> None:
    """A build option, or another torch, makes another wheel; the path is all that is printed."""
    tool = str(ROOT / "tools" / "horovod-wheel.sh")
    (kept,) = run(f"PYTHON={sys.executable} {tool}", ROOT)
    assert Path(kept).is_file()
    folder = tmp_path / "cache" / Path(kept).parent.name
    folder.mkdir(parents=True)
    (folder / Path(kept).name).touch()
    cache = f"IDIST_CACHE={tmp_path / 'cache'} PYTHON={sys.executable}"
    assert run(f"{cache} {tool}", ROOT) == [str(folder / Path(kept).name)]
    other = subprocess.run(
        ["sh", "-c", f"{cache} HOROVOD_WITH_MPI=1 PIP_NO_INDEX=1 PIP_FIND_LINKS= {tool}"],
        env=horovodrun.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    assert (other.returncode, other.stdout) == (1, ""), "it would have to be built, and nothing can be had for that"
    assert "Horovod could not be built" in other.stderr


def test_without_torch_the_tool_says_so(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    ended = subprocess.run(
        [str(ROOT / "tools" / "horovod-wheel.sh")],
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        timeout=30,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 1
    assert "has no torch" in ended.stderr
    assert ended.stdout == ""
