"""A checkpoint of one backend is one of every other: serial, gloo, mpi and Horovod, each with its own launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hvd import horovodrun

pytestmark = pytest.mark.horovod

SAMPLES, HAD = 48, 16
SCRIPT = """
import json, sys
from pathlib import Path
import torch, idist

FOLDER, BACKEND, LOADS, SAVES = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(), sys.argv[4] == "saves"

class Numbered(torch.utils.data.Dataset):
    def __len__(self): return 48
    def __getitem__(self, i): return i, torch.tensor([i / 48])

def parts():
    torch.manual_seed(0)
    model = idist.auto_model(torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)))
    optimizer = idist.auto_optim(torch.optim.AdamW(model.parameters(), lr=0.02))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    return {
        "model": model,
        "optimizer": optimizer,
        "schedule": schedule,
        "loader": idist.auto_dataloader(Numbered(), batch_size=8, shuffle=True),
    }

def train(model, optimizer, schedule, loader, most=None):
    used = []
    for number, (index, x) in enumerate(loader, 1):
        optimizer.zero_grad()
        (model(x) - x.sin()).square().mean().backward()
        optimizer.step()
        schedule.step()
        used += index.tolist()
        if number == most:
            break
    return sorted(i for share in idist.all_gather(used) for i in share)

def state(model, optimizer, schedule, loader):
    momenta = [[value.tolist() for value in values.values()] for values in optimizer.state.values()]
    return [[value.tolist() for value in model.parameters()], momenta, schedule.get_last_lr(), loader.state_dict()]

def main(local_rank):
    said = {}
    for origin in LOADS:
        loaded = parts()
        step = idist.load(FOLDER / origin, **loaded)["step"]
        found = state(**loaded)
        said[origin] = {"step": step, "state": found, "used": train(**loaded), "end": state(**loaded)[0]}
    if SAVES:
        fresh = parts()
        used = train(**fresh, most=2)
        saved = state(**fresh)
        idist.save(FOLDER / BACKEND, **fresh, step=2)
        said[BACKEND] = {"step": 2, "state": saved, "used": used}
    if idist.get_rank() == 0:
        name = f"{BACKEND}{'' if SAVES else ' again'}.json"
        (FOLDER / name).write_text(json.dumps(said))

with idist.Parallel(None if BACKEND == "serial" else BACKEND) as parallel:
    parallel.run(main)
"""

MPI = Path(sys.prefix.removesuffix("-horovod") + "-mpich", "bin")
LAUNCHERS: dict[str, list[str]] = {
    "serial": [sys.executable],
    "gloo": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "mpi": [str(MPI / "mpiexec"), "-n", "2", str(MPI / "python")],
    "horovod": [*horovodrun.command(2), sys.executable],
}


def run(folder: Path, backend: str, loads: list[str], *, saves: bool) -> dict[str, Any]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    words = [str(script), str(folder), backend, " ".join(loads), "saves" if saves else ""]
    variables = horovodrun.environment() if backend == "horovod" else dict(os.environ)
    ended = subprocess.run(
        [*LAUNCHERS[backend], *words],
        env=variables | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    said: dict[str, Any] = json.loads((folder / f"{backend}{'' if saves else ' again'}.json").read_text())
    return said


def flat(value: Any) -> list[float]:
    return [number for each in value for number in flat(each)] if isinstance(value, list) else [value]


@pytest.mark.timeout(600)
def test_each_loads_what_each_other_saved(tmp_path: Path) -> None:
    """There and back: on the way each loads what those before it saved, and on the way back what those after it did."""
    names = list(LAUNCHERS)
    saved: dict[str, Any] = {}
    loaded: dict[tuple[str, str], Any] = {}
    for i, backend in enumerate(names):
        said = run(tmp_path, backend, names[:i], saves=True)
        saved[backend] = said.pop(backend)
        loaded |= {(origin, backend): found for origin, found in said.items()}
    for i, backend in enumerate(names[:-1]):
        said = run(tmp_path, backend, names[i + 1 :], saves=False)
        loaded |= {(origin, backend): found for origin, found in said.items()}
    assert loaded.keys() == {(one, other) for one in names for other in names if one != other}
    for (origin, _), found in loaded.items():
        assert (found["step"], found["state"]) == (2, saved[origin]["state"])
        assert len(saved[origin]["used"]) == HAD
        assert sorted(saved[origin]["used"] + found["used"]) == list(range(SAMPLES))
        assert flat(found["end"]) == pytest.approx(flat(loaded["gloo", "serial"]["end"]), abs=1e-5)
