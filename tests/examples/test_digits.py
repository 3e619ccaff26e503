"""The demo script, unchanged, however it is run."""

import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "digits.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
Row = tuple[str, str, str, str]
"""Epoch, training loss, images recognised, images."""


def run(tmp_path: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def epochs(done: subprocess.CompletedProcess[str]) -> list[Row]:
    """Every row of the table."""
    assert done.returncode == 0, done.stderr
    return re.findall(r"(\d+) \W+ ([\d.]+) \W+ (\d+) of (\d+)", done.stdout)


WAYS = {
    "one process": ((), ()),
    "two spawned": ((), ("--nproc_per_node", "2")),
    "torchrun": (TORCHRUN, ()),
}


@pytest.fixture(scope="module")
def table_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Row]]:
    @cache
    def table(way: str) -> list[Row]:
        folder = tmp_path_factory.mktemp("digits")
        launcher, arguments = WAYS[way]
        done = run(folder, *arguments, "--min_accuracy", "0.97", launcher=launcher)
        found = epochs(done)
        assert (folder / "digits.png").read_bytes().startswith(b"\x89PNG")
        return found

    return table


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_reaches_97_percent(table_of: Callable[[str], list[Row]], way: str) -> None:
    assert [epoch for epoch, *_ in table_of(way)] == [str(epoch) for epoch in range(1, 16)]


@pytest.mark.slow
def test_two_runs_are_one(table_of: Callable[[str], list[Row]]) -> None:
    """Two ranks train to the same numbers however they are started."""
    assert table_of("two spawned") == table_of("torchrun")


@pytest.mark.slow
def test_every_image_counts_once(tmp_path: Path) -> None:
    """360 images do not divide by 7 ranks."""
    ((_, _, _, images),) = epochs(run(tmp_path, "--nproc_per_node", "7", "--batch_size", "35", "--epochs", "1"))
    assert images == "360"


@pytest.mark.slow
def test_fails_below_the_required_accuracy(tmp_path: Path) -> None:
    done = run(tmp_path, "--epochs", "1", "--min_accuracy", "1")
    assert done.returncode == 1
    assert "is below the required 100.00%" in done.stderr
