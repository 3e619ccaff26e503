"""The commands of docs/launchers/slurm.md, run as they stand there; what they print is what is written below them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.cluster import DOCUMENT, Job, run, succeed, until

pytestmark = pytest.mark.slurm

BLOCKS = re.findall(r"```console\n(.*?)```", DOCUMENT, re.DOTALL)
FILES = {
    name: text for text in re.findall(r"```(?:python|bash)\n(.*?)```", DOCUMENT, re.DOTALL)
    for name in re.findall(r"^# (\w+\.\w+)$", text, re.MULTILINE)
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files of the document, and a PATH on which ``python`` and ``torchrun`` are those that run this."""
    tmp_path = tmp_path_factory.mktemp("document")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, arguments in {"python": "", "torchrun": "-m torch.distributed.run"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (programs / name).chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(programs), prepend=":")
        patch.delenv("PYTHONUNBUFFERED", raising=False)  # with it a line is written in two pieces, and lines mix
        yield tmp_path


@pytest.fixture(autouse=True, scope="module")
def limited(folder: Path) -> Job:
    """A job whose time limit is one minute, for the last test. It waits for its warning while the others run.

    Slurm looks at the clock twice a minute, and so warns 15 to 45 s after the start.
    """
    # Without the mark of the tests' own processes: it comes and goes in the midst of tests that it has no part in.
    unmarked = ["env", "--unset=IDIST_TEST_SESSION"]
    limits = ["--time=1", "--signal=USR1@15", "--nodelist=node[3-4]"]
    said = succeed(*unmarked, "sbatch", "--parsable", *limits, "train.sh", cwd=folder).out
    job = Job(int(said), folder / "train.out")
    until(lambda: "begins" in job.written(), "the start")
    return job


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][2:50])
def test_prints_what_is_written(folder: Path, block: str) -> None:
    lines = block.splitlines()
    commands = [line[2:] for line in lines if line.startswith("$ ")]
    ended = run("bash", "-e", "-c", "\n".join(commands), cwd=folder)
    assert ended.code == 0, ended.err
    warned = [line for line in lines if line.startswith("UserWarning: ")]
    written = [line for line in lines if line not in warned and not line.startswith("$ ")]
    assert sorted(comparable(ended.out).splitlines()) == sorted(comparable("\n".join(written)).splitlines())
    assert all(comparable(line) in comparable(ended.err) for line in warned)
    assert ended.err.count("UserWarning") == len(warned)


def comparable(text: str) -> str:
    return re.sub(r"\b(job) \d+", r"\1 N", text)


def test_all_files_are_there() -> None:
    assert sorted(FILES) == ["job.sh", "train.py", "train.sh", "where.py"]
    assert len(BLOCKS) == 5


def test_a_job_that_is_warned_before_its_time_limit_is_requeued_and_goes_on(folder: Path, limited: Job) -> None:
    until(lambda: "goes on" in limited.written(), "the second run")
    saved = int((folder / "saved").read_text())
    assert saved > 0
    assert limited.state()["Restarts"] == "1"
    succeed("scancel", str(limited.number))
    said = [line for line in limited.wait().splitlines() if not line.startswith(("srun: ", "slurmstepd"))]
    assert said[:3] == ["begins", "told to stop: saved", "goes on"]
    assert int((folder / "saved").read_text()) > saved, "scancel sends SIGTERM, which is a warning too"
    assert not (folder / "done").exists()
