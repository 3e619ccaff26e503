"""The commands of docs/backends/xla.md, run as they stand there; what they print is what is written below them."""

from __future__ import annotations

from pathlib import Path

import pytest
from documents import run, scripts, sessions

PAGE = "backends/xla.md"
pytestmark = [pytest.mark.xla, pytest.mark.timeout(300)]


@pytest.mark.parametrize("session", sessions(PAGE), ids=lambda session: session[0][0])
def test_prints_what_is_written(tmp_path: Path, session: list[tuple[str, list[str]]]) -> None:
    for name, text in scripts(PAGE).items():
        (tmp_path / name).write_text(text)
    for command, printed in session:
        said, errors = run(command, tmp_path)
        assert said == printed, errors
