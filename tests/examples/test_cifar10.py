"""The whole run on CIFAR-10: what it reads and refuses, and that it ends the same, whatever ends it on the way."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo  # every optimizer imports it, and it then sets a variable: not within a test
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import idist

EXAMPLE = Path(__file__).parents[2] / "examples" / "cifar10"
QUICK = ["--depth", "8", "--epochs", "2", "--batch_size", "64", "--log_interval", "5", "--save_every", "3"]
STEPS = 16
TWO = ["--nproc_per_node", "2"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", *TWO, "--max-restarts", "1"]
SECONDS = 200

pytestmark = pytest.mark.timeout(2 * SECONDS + 40)


def part(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"cifar10_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


data, resnet = part("data"), part("resnet").resnet


# Runs


@contextmanager
def running(folder: Path, *arguments: str, launcher: list[str] | None = None) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, *(launcher or []), str(EXAMPLE / "main.py"), *QUICK, "--output", str(folder), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def until_step(process: subprocess.Popen[str], step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"step {step}:"):
            return
    raise AssertionError(f"there was no step {step}: {process.communicate()[1]}")


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors


def run(folder: Path, *arguments: str) -> None:
    with running(folder, *arguments) as process:
        finish(process)


def end(folder: Path) -> dict[str, Any]:
    """The last checkpoint."""
    model = resnet(8, data.CLASSES)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    values = idist.load(folder / "checkpoints", model=model, optimizer=optimizer)
    momenta = [state["momentum_buffer"].tolist() for state in optimizer.state.values()]
    weights = {name: value.tolist() for name, value in model.state_dict().items()}
    return {"weights": weights, "momenta": momenta, **values}


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    drawn = EventAccumulator(str(folder))
    drawn.Reload()
    return {name: [(point.step, point.value) for point in drawn.Scalars(name)] for name in drawn.Tags()["scalars"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing ends before its time."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, *TWO)
    return folder


@pytest.mark.slow
def test_learns(whole: Path) -> None:
    drawn = curves(whole)
    assert [step for step, _ in drawn["loss"]] == [5, 10, 15]
    assert [step for step, _ in drawn["accuracy"]] == [8, 16]
    assert drawn["loss"][-1][1] < drawn["loss"][0][1] / 2
    assert end(whole)["step"] == STEPS
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == ["00000006", "00000007"]


@pytest.mark.slow
def test_killed_in_the_middle_of_an_epoch_it_ends_as_if_it_had_not_been(whole: Path, tmp_path: Path) -> None:
    with running(tmp_path, *TWO) as process:
        until_step(process, 10)
        os.killpg(process.pid, signal.SIGKILL)
    assert 9 <= idist.load(tmp_path / "checkpoints")["step"] < STEPS
    run(tmp_path, *TWO)
    assert end(tmp_path) == end(whole)
    assert curves(tmp_path) == curves(whole)


@pytest.mark.slow
def test_torchrun_starts_it_again_when_a_rank_is_killed(whole: Path, tmp_path: Path) -> None:
    with running(tmp_path, launcher=TORCHRUN) as process:
        until_step(process, 10)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        finish(process)
    assert end(tmp_path) == end(whole)
    assert curves(tmp_path) == curves(whole)


@pytest.mark.slow
def test_sharded_it_learns_the_same(whole: Path, tmp_path: Path) -> None:
    run(tmp_path, *TWO, "--strategy", "fsdp")
    ours, theirs = curves(tmp_path)["loss"], curves(whole)["loss"]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in theirs], rel=1e-3)
    assert end(tmp_path)["weights"].keys() == end(whole)["weights"].keys()


@pytest.mark.slow
def test_told_to_stop_it_saves_and_goes_on_with_other_ranks(tmp_path: Path) -> None:
    """In mixed precision, with workers."""
    with running(tmp_path, "--amp", "--num_workers", "1") as process:
        until_step(process, 5)
        process.send_signal(signal.SIGTERM)
        finish(process)
    stopped = idist.load(tmp_path / "checkpoints")["step"]
    assert 5 <= stopped < STEPS
    run(tmp_path, *TWO, "--amp")
    assert end(tmp_path)["step"] == STEPS
    assert curves(tmp_path)["accuracy"][-1][0] == STEPS


# Data

FILES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
BYTES = 10_000 * 3_073


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of black images with label 0, which take no room on the disk."""
    for name in FILES:
        with (tmp_path / name).open("wb") as file:
            file.truncate(BYTES)
    return tmp_path


def write(path: Path, record: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(record * 3_073)
        file.write(content)


def test_records_are_a_label_and_three_planes(folder: Path) -> None:
    write(folder / "data_batch_2.bin", 7, bytes([3]) + bytes([10] * 1024) + bytes([20] * 1024) + bytes(range(256)) * 4)
    training, test = data.cifar10(folder)
    assert (len(training), len(test)) == (50_000, 10_000)
    image, label = training[10_007]
    assert (label.item(), label.dtype, image.dtype, image.shape) == (3, torch.int64, torch.uint8, data.SHAPE)
    assert image[0].eq(10).all()
    assert image[1].eq(20).all()
    assert image[2, 1].tolist() == list(range(32, 64))
    assert training[10_008][1].item() == 0


@pytest.mark.parametrize("name", [FILES[0], FILES[4], FILES[5]])
@pytest.mark.parametrize("size", [0, BYTES - 1, BYTES + 3_073])
def test_a_file_of_another_size_is_named(folder: Path, name: str, size: int) -> None:
    os.truncate(folder / name, size)
    with pytest.raises(ValueError, match=rf"{name} is broken: found {size:,} bytes, expected 30,730,000, which"):
        data.cifar10(folder)


def test_a_label_that_is_none_is_named(folder: Path) -> None:
    write(folder / "test_batch.bin", 9_999, bytes([10]))
    write(folder / "test_batch.bin", 77, bytes([255]))
    with pytest.raises(ValueError, match=r"test_batch\.bin is broken: found label 255 in record 77, .* \(2 are wrong"):
        data.cifar10(folder)


def test_a_file_that_is_missing_is_named(folder: Path) -> None:
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3\.bin is not there; expected the files of the binary"):
        data.cifar10(folder)


@pytest.mark.slow
def test_a_broken_file_ends_the_run(folder: Path, tmp_path: Path) -> None:
    os.truncate(folder / "data_batch_4.bin", 1_000)
    with running(tmp_path / "run", "--data", str(folder)) as process:
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert "data_batch_4.bin is broken: found 1,000 bytes, expected 30,730,000" in errors


def test_the_generated_set_is_the_same_every_time() -> None:
    images, again = data.generated(100, seed=1), data.generated(100, seed=1)
    assert [label.item() for _, label in images] == list(range(10)) * 10
    assert all(torch.equal(image, other) for (image, _), (other, _) in zip(images, again, strict=True))
    assert not torch.equal(images[0][0], data.generated(1, seed=2)[0][0])


@pytest.mark.parametrize("depth", [8, 14])
def test_the_network_has_as_many_layers(depth: int) -> None:
    network = resnet(depth, 10)
    layers = [m for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    shortcuts = 2  # where the number of channels changes
    assert len(layers) == depth + shortcuts
    assert network(torch.zeros(2, *data.SHAPE)).shape == (2, 10)


@pytest.mark.parametrize("depth", [0, 2, 9])
def test_no_network_has_that_depth(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth {depth} is not 6 n"):
        resnet(depth, 10)
