"""Test suites whose every test runs on every rank in step; one rank is of torch_xla as it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from xla import cpu_client

pytestmark = pytest.mark.xla

TESTS = Path(__file__).parents[1]
DEADLINE_S = 600

# At four ranks the files where the number of ranks matters: groups, and what is derived from other primitives.
CONFORMANCE_AT_4 = [f"conformance/test_{name}.py" for name in ("all_gather_uneven", "broadcast", "groups", "numbers")]
SUITES = {
    1: (["conformance", "xla/ranks"], {"IDIST_ATTACH": "xla-tpu", **cpu_client.VARIABLES}, 1250),
    2: (["conformance", "xla/ranks"], {"IDIST_REPLICAS": "2", **cpu_client.environment(2)}, 1350),
    4: ([*CONFORMANCE_AT_4, "xla/ranks"], {"IDIST_REPLICAS": "4", **cpu_client.environment(4)}, 300),
}
"""By the number of ranks: what runs, with which variables, and fewer tests than there are: so many have to pass."""


@pytest.mark.timeout(DEADLINE_S + 30)
@pytest.mark.parametrize("size", SUITES)
def test_every_test_passes_on_every_rank(size: int) -> None:
    paths, variables, least = SUITES[size]
    # One after the other: each folder has a world of its own.
    passed = sum(run(path, variables) for path in paths)
    assert passed > least


def run(path: str, variables: Mapping[str, str]) -> int:
    """How many tests of it passed; all have."""
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no", str(TESTS / path)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 0, ended.stdout[-20000:] + ended.stderr[-5000:]
    (passed,) = re.findall(r"(\d+) passed", ended.stdout)
    return int(passed)
