"""The commands of Slurm, each with a deadline, and what the processes that they started have left to read."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

SCRIPTS = Path(__file__).parent / "scripts"
DOCUMENT = (Path(__file__).parents[2] / "docs" / "launchers" / "slurm.md").read_text()
DEADLINE_S = 90.0


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float


def run(
    *command: str | Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = DEADLINE_S,
    stdin: int | IO[str] = subprocess.DEVNULL,
) -> Ended:
    """Run a command on the login node; one that is not done in time is an error with all that it has written."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        cwd=cwd,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise AssertionError(f"{shlex.join(process.args)} is not done after {timeout} s\n{out}{err}") from None
        raise
    return Ended(process.returncode, out, err, time.monotonic() - begun)


def succeed(*command: str | Path, **how: Any) -> Ended:
    """Run a command that has to succeed."""
    ended = run(*command, **how)
    assert ended.code == 0, f"{shlex.join(map(str, command))} ended with {ended.code}\n{ended.out}{ended.err}"
    return ended


def python(script: str, *arguments: str | Path) -> list[str]:
    """The command that runs one of ``scripts/``."""
    return [sys.executable, str(SCRIPTS / script), *map(str, arguments)]


def told(folder: Path) -> list[dict[str, Any]]:
    """What the processes have told until now, by rank."""
    said = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(said, key=lambda each: each.get("rank", 0))


def until(condition: Callable[[], Any], what: str, timeout: float = DEADLINE_S) -> None:
    """Wait for ``condition``."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout} s"
        time.sleep(0.1)


def assert_says(text: str, *pieces: str) -> None:
    """The message is there, and the document shows its users the same words."""
    for piece in pieces:
        assert piece in text, f"{piece!r} is not in\n{text}"
        assert piece in DOCUMENT, f"docs/launchers/slurm.md does not show {piece!r}"


@dataclass(frozen=True)
class Job:
    """A batch job, and the file that its processes write to."""

    number: int
    output: Path

    def state(self) -> dict[str, str]:
        shown = succeed("scontrol", "show", "job", "--oneliner", str(self.number)).out
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait(self, timeout: float = DEADLINE_S) -> str:
        """Until it has ended, whatever way; returns what it wrote."""
        running = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
        until(lambda: self.state()["JobState"] not in running, f"the end of job {self.number}", timeout)
        return self.written()

    def succeed(self, timeout: float = DEADLINE_S) -> str:
        """Until it has ended, which has to be well; returns what it wrote."""
        written = self.wait(timeout)
        assert self.state()["JobState"] == "COMPLETED", f"job {self.number} is {self.state()['JobState']}\n{written}"
        return written

    def written(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


def submit(folder: Path, script: str, *options: str, env: Mapping[str, str] | None = None) -> Job:
    """Hand a batch script to Slurm."""
    path = folder / "job.sh"
    path.write_text(f"#!/bin/bash\n{script}\n")
    said = succeed("sbatch", "--parsable", "--output=%j.out", *options, path, cwd=folder, env=env).out
    number = int(said.strip())
    return Job(number, folder / f"{number}.out")


def next_job() -> int:
    """The number of the next job."""
    (number,) = re.findall(r"^NEXT_JOB_ID\s*= (\d+)$", succeed("scontrol", "show", "config").out, re.MULTILINE)
    return int(number)


def set_next_job(number: int) -> None:
    """Have Slurm give the next job this number, which is not below the one that it has in mind."""
    conf = Path(os.environ["SLURM_CONF"])
    text, count = re.subn(r"^FirstJobId=\d+$", f"FirstJobId={number}", conf.read_text(), flags=re.MULTILINE)
    assert count == 1
    fresh = conf.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(conf)
    succeed("scontrol", "reconfigure")


def jobs() -> list[str]:
    """All jobs that are not done."""
    return succeed("squeue", "--noheader", "--format=%A").out.split()
