"""torchrun starts the ranks again when one dies: the run ends as if none had, and every sample is used once."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

SAMPLES, BATCH, EPOCHS = 60, 8, 2

HEAD = f"SAMPLES, BATCH, EPOCHS = {SAMPLES}, {BATCH}, {EPOCHS}\n"
SCRIPT = """
import json, os, random, signal, sys
from pathlib import Path
import torch, idist

FOLDER, dies, every = Path(sys.argv[1]), [int(step) for step in sys.argv[2].split(",") if step], int(sys.argv[3])

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
        if every and step % every == 0:
            idist.save(FOLDER / "checkpoints", **parts, step=step, epoch=epoch, keep=2)
        if not every and step == dies[0]:  # an end in order, in place of a death
            idist.save(FOLDER / "checkpoints", **parts, step=step, epoch=epoch)
            idist.finalize()
            sys.exit()
weights = [value.tolist() for value in model.state_dict().values()]
(FOLDER / f"ended {rank}").write_text(json.dumps([step, weights]))
idist.finalize()
"""


def train(folder: Path, size: int, dies: list[int], every: int) -> None:
    folder.mkdir(exist_ok=True)
    script = folder / "script.py"
    script.write_text(HEAD + SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    arguments = [str(folder), ",".join(map(str, dies)), str(every)]
    ended = subprocess.run(
        [*torchrun, "--max-restarts", str(len(dies)), str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 0, ended.stderr


def ends(folder: Path) -> list[Any]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("ended *"))]


def assert_each_sample_once(folder: Path) -> None:
    """What a rank used in a step that was done again has been overwritten."""
    used: Counter[tuple[int, int]] = Counter()
    for path in folder.glob("used *"):
        epoch, indices = json.loads(path.read_text())
        used.update((epoch, index) for index in indices)
    assert used == {(epoch, index): 1 for epoch in range(EPOCHS) for index in range(SAMPLES)}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("every", [1, 3])
def test_a_run_whose_ranks_are_killed_ends_as_one_whose_are_not(tmp_path: Path, every: int) -> None:
    """At any step: at the first, at the last, right after a checkpoint and right before one."""
    steps = -(-SAMPLES // BATCH) * EPOCHS
    killed = sorted({1, steps, random.Random(every).randrange(2, steps)})
    train(tmp_path / "whole", 2, [], every)
    train(tmp_path / "killed", 2, killed, every)
    assert len(list((tmp_path / "killed").glob("died *"))) == len(killed)
    assert ends(tmp_path / "killed") == ends(tmp_path / "whole")
    assert ends(tmp_path / "whole")[0][0] == steps
    assert_each_sample_once(tmp_path / "killed")


@pytest.mark.timeout(240)
def test_on_another_number_of_ranks_every_sample_is_used_once(tmp_path: Path) -> None:
    """From 3 ranks to 2; tests/auto/test_resume.py has other numbers, in threads."""
    train(tmp_path, 3, [5], 0)
    train(tmp_path, 2, [], 50)
    assert len(ends(tmp_path)) == 2
    assert_each_sample_once(tmp_path)
