"""The scripts of docs/data.md, run as they stand there: they print what is written below them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCUMENT = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"```console\n(.*?)```", DOCUMENT, re.DOTALL)
SCRIPTS = {
    text.partition("\n")[0].removeprefix("# "): text for text in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
}


def test_every_script_is_run() -> None:
    assert [f"$ python {name}" for name in SCRIPTS] == [block.splitlines()[0] for block in BLOCKS]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][2:])
def test_prints_what_is_written(tmp_path: Path, block: str) -> None:
    command, *printed = block.splitlines()
    name = command.removeprefix("$ python ")
    (tmp_path / name).write_text(SCRIPTS[name])
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    ended = subprocess.run(
        [sys.executable, name],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=90,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert ended.stdout.splitlines() == printed
