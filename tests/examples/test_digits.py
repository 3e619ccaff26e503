"""The demo script, unchanged, however it is run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "digits.py"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def run(tmp_path: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def epochs(done: subprocess.CompletedProcess[str]) -> list[tuple[str, str, str, str]]:
    """Of every row of the table: epoch, training loss, images recognised, images."""
    assert done.returncode == 0, done.stderr
    return re.findall(r"(\d+) \W+ ([\d.]+) \W+ (\d+) of (\d+)", done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "arguments"),
    [((), ()), ((), ("--nproc_per_node", "2")), (TORCHRUN, ())],
    ids=["one process", "two spawned", "torchrun"],
)
def test_reaches_97_percent(tmp_path: Path, launcher: tuple[str, ...], arguments: tuple[str, ...]) -> None:
    done = run(tmp_path, *arguments, "--min_accuracy", "0.97", launcher=launcher)
    assert [epoch for epoch, *_ in epochs(done)] == [str(epoch) for epoch in range(1, 16)]
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_image_counts_once(tmp_path: Path) -> None:
    """360 images do not divide by 7 ranks."""
    ((_, _, _, images),) = epochs(run(tmp_path, "--nproc_per_node", "7", "--batch_size", "35", "--epochs", "1"))
    assert images == "360"


@pytest.mark.slow
def test_two_runs_are_one(tmp_path: Path) -> None:
    first, second = (epochs(run(tmp_path, "--nproc_per_node", "2", "--epochs", "2")) for _ in range(2))
    assert len(first) == 2
    assert first == second


@pytest.mark.slow
def test_fails_below_the_required_accuracy(tmp_path: Path) -> None:
    done = run(tmp_path, "--epochs", "1", "--min_accuracy", "1")
    assert done.returncode == 1
    assert "is below the required 100.00%" in done.stderr
