"""The pages' commands, run as they stand there: what they show is what happens.

Each runs in the suite that has its programs. The pages of MPI, Horovod and Slurm have tests of their own there.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documents import here, install, offered, run, scripts, sessions

PAGES = (
    "quickstart.md",
    "commands.md",
    "data.md",
    "training.md",
    "hangs.md",
    "backends/torch.md",
    "launchers/python.md",
    "launchers/torchrun.md",
    "launchers/mpiexec.md",
    "launchers/horovodrun.md",
    "launchers/kubernetes.md",
    "moving/ignite.md",
    "moving/torch.md",
    "extending.md",
)
MARKS = {r"\bmpiexec\b": pytest.mark.mpi, r"\bhorovod(run)?\b": pytest.mark.horovod}


def marked(page: str, number: int, session: list[tuple[str, list[str]]]) -> object:
    commands = "; ".join(command for command, _ in session)
    marks = [mark for program, mark in MARKS.items() if re.search(program, commands)]
    return pytest.param(page, number, id=f"{page}-{session[0][0][:60]}", marks=marks)


SESSIONS = [marked(page, i, session) for page in PAGES for i, session in enumerate(sessions(page))]


@pytest.mark.parametrize("page", PAGES)
def test_every_script_is_run(page: str) -> None:
    commands = " ".join(command for session in sessions(page) for command, _ in session)
    commands += " ".join(offered(page))
    assert [name for name in scripts(page) if name not in commands] == []


@pytest.mark.timeout(500)
@pytest.mark.parametrize(("page", "number"), SESSIONS)
def test_prints_what_is_written(tmp_path: Path, page: str, number: int) -> None:
    """Line by line, in any order: ranks do not wait for each other before they print."""
    for name, text in scripts(page).items():
        (tmp_path / name).write_text(text)
    install(offered(page), tmp_path)
    for command, printed in sessions(page)[number]:
        said, errors = run(here(command), tmp_path)
        assert sorted(filter(None, said)) == sorted(filter(None, printed)), errors
