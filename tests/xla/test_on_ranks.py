"""Test suites whose every test runs on every rank in step; one rank is of torch_xla as it is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from xla import cpu_client

pytestmark = pytest.mark.xla

TESTS = Path(__file__).parents[1]
SUITES = {"conformance": 1250, "xla/ranks": 15}
"""Folders, each with fewer tests than it has: so many have to pass on every rank."""

DEADLINE_S = 600


@pytest.mark.timeout(DEADLINE_S + 30)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("folder", SUITES)
def test_every_test_passes_on_every_rank(folder: str, size: int) -> None:
    world = {"IDIST_ATTACH": "xla-tpu"} if size == 1 else {"IDIST_REPLICAS": str(size)}
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no", str(TESTS / folder)],
        env=cpu_client.environment(size) | world,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 0, ended.stdout[-20000:] + ended.stderr[-5000:]
    (passed,) = re.findall(r"(\d+) passed", ended.stdout)
    assert int(passed) > SUITES[folder]
