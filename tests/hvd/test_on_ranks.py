"""Test suites whose every test runs on every rank in step: pytest itself is what horovodrun starts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hvd import horovodrun

pytestmark = pytest.mark.horovod

TESTS = Path(__file__).parents[1]
SUITES = {"conformance": 1400, "hvd/ranks": 35}
"""Folders, each with fewer tests than it has: so many have to pass on every rank."""

DEADLINE_S = 400


@pytest.mark.timeout(DEADLINE_S + 30)
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("folder", SUITES)
def test_every_test_passes_on_every_rank(folder: str, size: int) -> None:
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no", str(TESTS / folder)]
    ended = subprocess.run(
        [*horovodrun.command(size), *pytest_],
        env=horovodrun.environment(IDIST_ATTACH="horovod"),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 0, ended.stdout[-20000:] + ended.stderr[-5000:]
    passed = [int(count) for count in re.findall(r"(\d+) passed", ended.stdout)]
    assert len(passed) == size, ended.stdout[-5000:]
    assert min(passed) > SUITES[folder]
