"""torchrun starts the ranks again when one dies: the run ends as if none had, and every sample is used once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from processes import LOOPBACK, free_port

SAMPLES, BATCH, EPOCHS = 60, 8, 2
STEPS = -(-SAMPLES // BATCH) * EPOCHS
SECONDS = 250

pytestmark = pytest.mark.timeout(2 * SECONDS + 60)

HEAD = f"SAMPLES, BATCH, EPOCHS = {SAMPLES}, {BATCH}, {EPOCHS}\n"
SCRIPT = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch, idist

FOLDER, every = Path(sys.argv[1]), int(sys.argv[2])
dies, told, waits = ([int(step) for step in words.split(",") if step] for words in sys.argv[3:6])

class Noted(torch.utils.data.Dataset):
    def __len__(self): return SAMPLES
    def __getitem__(self, i): return i, torch.tensor([i / SAMPLES])

idist.initialize("gloo", timeout=60)
idist.seed_all(3)
loader = idist.auto_dataloader(Noted(), batch_size=BATCH, shuffle=True, num_workers=2)
net = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
model = idist.auto_model(net)
optimizer = idist.auto_optim(torch.optim.AdamW(model.parameters(), lr=0.05))
idist.seed_all(3, per_rank=True)
parts = {"model": model, "optimizer": optimizer, "loader": loader}
state = idist.load(FOLDER / "checkpoints", **parts, missing_ok=True)
step, begun, rank, size = state.get("step", 0), state.get("epoch", 0), idist.get_rank(), idist.get_world_size()
for epoch in range(begun, EPOCHS):
    for index, x in loader:
        step += 1
        if step in dies and rank == step % size and not (FOLDER / f"died {step}").exists():
            (FOLDER / f"died {step}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (model(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        (FOLDER / f"used {step} {rank}").write_text(json.dumps([epoch, index.tolist()]))
        if step in told and rank == step % size:
            os.kill(os.getpid(), signal.SIGTERM)
        leaving = idist.should_stop()
        while step in waits and not leaving:
            time.sleep(0.05)
            leaving = idist.should_stop()
        if leaving or every and step % every == 0:
            idist.save(FOLDER / "checkpoints", **parts, step=step, epoch=epoch, keep=2)
        if leaving:
            idist.finalize()
            sys.exit()
weights = [value.tolist() for value in model.state_dict().values()]
(FOLDER / f"ended {rank}").write_text(json.dumps([step, size, weights]))
idist.finalize()
"""


def started(
    folder: Path,
    torchrun: list[str],
    *,
    every: int = 0,
    dies: list[int] | None = None,
    told: list[int] | None = None,
    waits: list[int] | None = None,
) -> subprocess.Popen[str]:
    """torchrun with the script.

    Args:
        every: steps from one checkpoint to the next; 0: none, unless the ranks are told to stop.
        dies: steps at which one rank is killed, once each.
        told: steps after which one rank is told to stop.
        waits: steps after which the ranks wait until they are told to.
    """
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(HEAD + SCRIPT)
    steps = [",".join(map(str, given or [])) for given in (dies, told, waits)]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *torchrun, str(script), str(folder), str(every), *steps],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},  # or nodes that join do not find rank 0
    )


def finish(torchrun: subprocess.Popen[str]) -> None:
    try:
        _, errors = torchrun.communicate(timeout=SECONDS)
    finally:
        torchrun.kill()
        torchrun.wait()
    assert torchrun.returncode == 0, errors


def train(folder: Path, size: int, **how: Any) -> None:
    restarts = str(len(how.get("dies", [])))
    finish(started(folder, ["--standalone", "--nproc-per-node", str(size), "--max-restarts", restarts], **how))


def ends(folder: Path) -> list[Any]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("ended *"))]


def assert_each_sample_once(folder: Path) -> None:
    """What a rank used in a step that was done again has been overwritten."""
    used: Counter[tuple[int, int]] = Counter()
    for path in folder.glob("used *"):
        epoch, indices = json.loads(path.read_text())
        used.update((epoch, index) for index in indices)
    assert used == {(epoch, index): 1 for epoch in range(EPOCHS) for index in range(SAMPLES)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing ends and that saves nothing."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, 2)
    return folder


def test_a_run_whose_ranks_are_killed_ends_as_one_whose_are_not(whole: Path, tmp_path: Path) -> None:
    """At the first step, right after a checkpoint or right before one, and at the last."""
    killed = [1, random.Random(3).choice([4, 6]), STEPS]
    train(tmp_path, 2, every=3, dies=killed)
    assert len(list(tmp_path.glob("died *"))) == len(killed)
    assert ends(tmp_path) == ends(whole)
    assert ends(whole)[0][:2] == [STEPS, 2]
    assert_each_sample_once(tmp_path)


def test_told_to_stop_and_begun_again_on_fewer_ranks_every_sample_is_used_once(tmp_path: Path) -> None:
    """From 3 ranks to 2; tests/auto/test_resume.py has other numbers, in threads."""
    train(tmp_path, 3, told=[5])
    assert ends(tmp_path) == []
    train(tmp_path, 2)
    assert [size for _, size, _ in ends(tmp_path)] == [2, 2]
    assert_each_sample_once(tmp_path)


def test_when_a_node_joins_every_sample_is_used_once(tmp_path: Path) -> None:
    """torchrun then tells the ranks to stop, and starts all: nothing is saved but what `should_stop()` leads to."""
    elastic = ["--nnodes", "1:2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "joins"]
    elastic += ["--rdzv-endpoint", f"{LOOPBACK}:{free_port()}", "--local-addr", LOOPBACK]
    elastic += ["--rdzv-conf", "last_call_timeout=1"]  # how long the first node waits for others before it begins
    first = started(tmp_path, elastic, waits=[5])
    try:
        wait_for(tmp_path / "used 5 0", first)
        second = started(tmp_path, elastic, waits=[5])
        finish(second)
        finish(first)
    finally:
        first.kill()
        first.wait()
    assert [end[:2] for end in ends(tmp_path)] == [[STEPS, 2]] * 2
    assert ends(tmp_path)[0] == ends(tmp_path)[1]
    assert_each_sample_once(tmp_path)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + SECONDS
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until, f"there is no {path}"
        time.sleep(0.05)
