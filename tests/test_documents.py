"""The pages that need pip alone: what they show is what happens."""

from __future__ import annotations

from pathlib import Path

import pytest
from documents import run, scripts, sessions

PAGES = ("data.md", "training.md")
SESSIONS = [pytest.param(page, i, id=f"{page}-{s[0][0]}") for page in PAGES for i, s in enumerate(sessions(page))]


@pytest.mark.parametrize("page", PAGES)
def test_every_script_is_run(page: str) -> None:
    commands = " ".join(command for session in sessions(page) for command, _ in session)
    assert [name for name in scripts(page) if name not in commands] == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("page", "number"), SESSIONS)
def test_prints_what_is_written(tmp_path: Path, page: str, number: int) -> None:
    for name, text in scripts(page).items():
        (tmp_path / name).write_text(text)
    for command, printed in sessions(page)[number]:
        said, errors = run(command, tmp_path)
        assert said == printed, errors
