"""Batches that a thread copies to the device while another runs what has been computed there."""

from __future__ import annotations

import subprocess
import sys

import pytest

from xla import cpu_client

pytestmark = [pytest.mark.xla, pytest.mark.timeout(300)]

FEED = """
import torch
import torch_xla
from idist.backends.xla.training import Feed

batches = [(torch.full((64, 64), float(i)), torch.full((16,), i)) for i in range(500)]
means = [x.mean() + y.sum() for x, y in Feed(batches, torch_xla.device(), torch_xla.sync)]
assert torch.stack(means).tolist() == [17.0 * i for i in range(500)]
"""


def test_every_batch_is_what_it_was() -> None:
    """Copied by `to()`, it ends with an error, or a loss that is another in each run."""
    for _ in range(3):
        ended = subprocess.run(
            [sys.executable, "-c", FEED],
            env=cpu_client.environment(1),
            capture_output=True,
            text=True,
            timeout=90,
            stdin=subprocess.DEVNULL,
        )
        assert ended.returncode == 0, ended.stderr
