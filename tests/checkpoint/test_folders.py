"""What is on the disk: whole checkpoints alone, whatever ends a save on the way; and what is refused."""

from __future__ import annotations

import argparse
import os
import pickle
import random
import re
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from processes import LOOPBACK, free_port, started
from torch import nn

import idist
from checkpoint.test_training_goes_on import ranks
from idist.checkpoint import contents, folders
from idist.testing import run_threads


def saves_for_ever(rank: int, size: int, folder: Path, said: Path) -> None:
    """Save again and again, and say of which number it is when it is done; and, for a start, which process this is."""
    if size > 1:
        idist.initialize("gloo", rank=rank, world_size=size, timeout=60)
    (said / f"pid {rank}").write_text(str(os.getpid()))
    model = nn.Linear(400, 400)
    model.weight.requires_grad_(False)
    number = 0
    while True:
        number += 1
        model.weight.fill_(number)
        idist.save(folder, model=model, number=number, keep=2)
        if rank == 0:
            (said / f"saved {number}").touch()


def kill_at_any_moment(size: int, folder: Path, said: Path, chance: random.Random) -> int:
    """Kill all ranks at once, some time after the first checkpoint; the number of the last of which they said so."""
    said.mkdir()
    where = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": free_port()}
    with started(saves_for_ever, size, size, folder, said, env=lambda rank: where, timeout=60) as wait:
        until = time.monotonic() + 50
        while not (said / "saved 1").exists():
            assert time.monotonic() < until, wait()
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        for rank in range(size):
            with suppress(ProcessLookupError):  # it has ended already, as the rank before it is gone
                os.kill(int((said / f"pid {rank}").read_text()), signal.SIGKILL)
        writer, *others = wait()
        assert writer.error == "it ended without an answer, exit code -9"
        assert all(other.error for other in others)
    return max(int(path.name.split()[1]) for path in said.glob("saved *"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_after_the_other(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "checkpoints"
    assert [idist.save(folder, turn=turn).name for turn in range(3)] == ["00000001", "00000002", "00000003"]
    assert idist.load(folder) == {"turn": 2}
    assert idist.load(folder / "00000001") == {"turn": 0}
    assert idist.save(str(folder), keep=2) == folder / "00000004"
    assert names(folder) == ["00000003", "00000004"]
    assert idist.save(folder, keep=1).name == "00000005"
    assert names(folder) == ["00000005"]


def test_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".00000001.abc.partial").mkdir()
    (tmp_path / "00000002").mkdir()
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert idist.load(folder, missing_ok=True) == {}
        with pytest.raises(FileNotFoundError, match=r"there is no checkpoint in .*"):
            idist.load(folder)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("size", [1, 2])
def test_killed_in_the_middle(tmp_path: Path, size: int) -> None:
    """Again and again, at any moment: the newest checkpoint is whole, and the next save begins after it."""
    folder, chance = tmp_path / "run", random.Random(size)
    newest = 0
    for turn in range(4):
        said = kill_at_any_moment(size, folder, tmp_path / f"said {turn}", chance)
        model = nn.Linear(400, 400)
        number = idist.load(folder, model=model)["number"]
        assert number >= said
        assert model.weight.eq(number).all()
        now = int(max(name for name in names(folder) if not name.startswith(".")))
        assert now > newest
        newest = now
    idist.save(folder, keep=1)
    assert names(folder) == [f"{newest + 1:08d}"], "what the killed ones left is gone"


def test_all_random_states_come_back(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [random.random(), float(numpy.random.rand()), torch.rand(3).tolist(), numpy.random.normal()]

    idist.save(tmp_path)
    drawn = draw()
    idist.load(tmp_path)
    assert draw() == drawn


def draws(folder: str, loads: bool) -> float:
    torch.manual_seed(idist.get_rank())
    if loads:
        idist.load(folder)
    else:
        idist.save(folder)
    return torch.rand(1).item()


def test_each_rank_gets_its_own_random_state_back_and_others_stay_as_they_are(tmp_path: Path) -> None:
    before = ranks(2, draws, str(tmp_path), False)
    assert len(set(before)) == 2
    assert ranks(2, draws, str(tmp_path), True) == before
    torch.manual_seed(2)
    assert ranks(3, draws, str(tmp_path), True) == [*before, torch.rand(1).item()]  # each its seed, as on two


def test_a_save_changes_nothing(tmp_path: Path) -> None:
    """torch's own way to get the state of an optimizer that has not stepped is to step it."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    idist.save(tmp_path, model=model, optimizer=optimizer)
    assert optimizer.state_dict()["state"] == {}
    other = torch.optim.Adam(model.parameters(), lr=0.5)
    idist.load(tmp_path, model=model, optimizer=other)
    assert other.state_dict() == optimizer.state_dict()


def test_plain_values_of_all_kinds(tmp_path: Path) -> None:
    values = {
        "i": 2**62,
        "f": 0.1,
        "n": None,
        "s": "é",
        "t": (1, [True]),
        "d": {"a": {3: b"bytes"}},
        "x": torch.arange(3),
    }
    idist.save(tmp_path, **values)
    loaded = idist.load(tmp_path)
    assert torch.equal(loaded.pop("x"), values.pop("x"))  # type: ignore[arg-type]
    assert loaded == values


def test_objects_with_a_state(tmp_path: Path) -> None:
    scaler, fresh = torch.amp.GradScaler("cpu", init_scale=32.0), torch.amp.GradScaler("cpu")
    idist.save(tmp_path, scaler=scaler, epoch=1)
    assert idist.load(tmp_path, scaler=fresh) == {"epoch": 1}
    assert fresh.get_scale() == 32.0
    assert idist.load(tmp_path)["scaler"] == scaler.state_dict()


class Attack:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch attacked",)


@pytest.mark.parametrize("value", [argparse.Namespace(a=1), lambda: None, Attack(), {"deep": [object()]}])
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path, value: Any) -> None:
    idist.save(tmp_path, good=1)
    with pytest.raises(idist.ConfigError, match=r"'config', .*, is not plain data"):
        idist.save(tmp_path, config=value)
    assert idist.load(tmp_path) == {"good": 1}
    assert names(tmp_path) == ["00000001"]


@pytest.mark.parametrize("file", ["details.pt", ".metadata"])
def test_a_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(2, 2)
    checkpoint = idist.save("run", model=model)
    if file == ".metadata":
        (checkpoint / file).write_bytes(pickle.dumps(Attack()))
    else:
        torch.save({"values": Attack()}, checkpoint / file)
    with pytest.raises(pickle.UnpicklingError):
        idist.load("run", model=model)
    assert not Path("attacked").exists()


BAD: dict[str, tuple[Callable[[Path, nn.Module], Any], str]] = {
    "keep": (lambda path, model: idist.save(path, keep=0), "keep is the number of checkpoints to keep"),
    "optimizer alone": (
        lambda path, model: idist.save(path, optimizer=torch.optim.SGD(model.parameters())),
        "optimizer without model",
    ),
    "optimizer of another model": (
        lambda path, model: idist.save(path, model=model, optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters())),
        "2 of the optimizer's 2 parameters are not of this model",
    ),
    "a checkpoint as the folder": (lambda path, model: idist.save(path / "00000001"), "is itself a checkpoint"),
    "a shape": (
        lambda path, model: idist.load(path, model=nn.Linear(3, 2)),
        r"does not fit the model: weight: \[2, 2\] in the checkpoint, \[2, 3\] in the model",
    ),
    "a parameter too few": (
        lambda path, model: idist.load(path, model=nn.Linear(2, 2, bias=False)),
        "does not fit the model: not in the model: bias",
    ),
    "a parameter too many": (
        lambda path, model: idist.load(path, model=nn.Sequential(nn.Linear(2, 2))),
        "not in the checkpoint: 0.bias; not in the checkpoint: 0.weight; not in the model: bias",
    ),
    "no optimizer in it": (
        lambda path, model: idist.load(path, model=model, optimizer=torch.optim.SGD(model.parameters())),
        "was saved without an optimizer",
    ),
    "no loader in it": (lambda path, model: idist.load(path, loader=object()), "was saved without a loader"),
    "no such value": (
        lambda path, model: idist.load(path, scaler=torch.amp.GradScaler("cpu")),
        "has no 'scaler'; it has epoch",
    ),
    "a plain value": (
        lambda path, model: idist.load(path, epoch=1),
        "epoch=1: load puts back objects with load_state_dict",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_told_and_changes_nothing(tmp_path: Path, what: str) -> None:
    model = nn.Linear(2, 2)
    idist.save(tmp_path, model=model, epoch=1)
    before = [parameter.clone() for parameter in model.parameters()]
    call, message = BAD[what]
    with pytest.raises(idist.ConfigError, match=message):
        call(tmp_path, model)
    assert names(tmp_path) == ["00000001"]
    assert all(map(torch.equal, before, model.parameters()))


def test_another_number_of_groups(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    idist.save(tmp_path, model=model, optimizer=torch.optim.SGD(model.parameters()))
    apart = torch.optim.SGD([{"params": [parameter]} for parameter in model.parameters()])
    with pytest.raises(idist.ConfigError, match=r"1 groups of 2 parameters in the checkpoint, 2 groups of 1, 1 here"):
        idist.load(tmp_path, model=model, optimizer=apart)


def test_one_rank_that_fails_is_heard_by_all(tmp_path: Path) -> None:
    class Loader:
        def state_dict(self) -> dict[str, int]:
            if idist.get_rank() == 1:
                raise KeyError("lost")
            return {}

    def saves() -> str:
        try:
            idist.save(tmp_path / "run", loader=Loader())
        except (KeyError, idist.PeerFailed) as error:
            return f"{type(error).__name__}: {error}"
        return "saved"

    heard = run_threads(saves, 3)
    assert heard[1] == "KeyError: 'lost'"
    assert heard[0] == heard[2] == "PeerFailed: save cannot go on. rank 1: KeyError: 'lost'"
    assert not (tmp_path / "run").exists()


def test_a_rank_that_cannot_read_is_heard_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process group of torch each rank reads by itself."""
    model = nn.Linear(2, 2)
    idist.save(tmp_path, model=model)
    read = contents.read

    def broken(*args: Any) -> None:
        if idist.get_rank() == 1:
            raise OSError("input/output error")
        read(*args)

    monkeypatch.setattr(contents, "read", broken)

    def loads() -> str:
        try:
            idist.load(tmp_path, model=nn.Linear(2, 2))
        except (OSError, idist.PeerFailed) as error:
            return f"{type(error).__name__}: {error}"
        return "loaded"

    heard = run_threads(loads, 3)
    assert heard[1] == "OSError: input/output error"
    assert heard[0] == heard[2] == "PeerFailed: load cannot go on. rank 1: OSError: input/output error"


def saves_in_the_background(folder: str, strategy: str) -> list[Any]:
    """What is saved is what was there at the call, whatever is done to it while it is written."""
    model = idist.auto_model(nn.Linear(500, 500), strategy=strategy)
    handles = []
    for step in range(3):
        set_to(model, step)
        handles.append(idist.save(folder, model=model, step=step, keep=2, async_op=True))
        set_to(model, -1)
    said: list[Any] = [handle.wait().name for handle in handles]
    said.append(idist.load(folder, model=model))
    said.append({value for parameter in model.parameters() for value in local(parameter).unique().tolist()})
    return said


def set_to(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).fill_(value)


def local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter.detach()


@pytest.mark.parametrize(("size", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp")])
def test_in_the_background(tmp_path: Path, size: int, strategy: str) -> None:
    for said in ranks(size, saves_in_the_background, str(tmp_path), strategy):
        assert said == ["00000001", "00000002", "00000003", {"step": 2}, {2.0}]
    assert names(tmp_path) == ["00000002", "00000003"]


def saves_and_ends(folder: str) -> None:
    idist.save(folder, step=1, async_op=True)


def test_the_end_waits_for_what_is_being_written(tmp_path: Path) -> None:
    ranks(2, saves_and_ends, str(tmp_path))
    assert idist.load(tmp_path) == {"step": 1}


def test_plain_values_in_the_background_are_those_of_the_call(tmp_path: Path) -> None:
    counts = [1, 2]
    handle = idist.save(tmp_path, counts=counts, async_op=True)
    counts.append(3)
    handle.wait()
    assert idist.load(tmp_path) == {"counts": [1, 2]}
    idist.finalize()


def fails_in_the_background(folder: str) -> str:
    def full(*args: Any) -> Path:
        raise OSError("no space left on device")

    folders.complete, complete = full, folders.complete
    try:
        handle = idist.save(folder, step=1, async_op=True)
        with pytest.raises((OSError, idist.PeerFailed), match="no space left") as caught:
            handle.wait()
    finally:
        folders.complete = complete
    idist.save(folder, step=2)  # it has been told once
    return type(caught.value).__name__


def save_and_wait(folder: str, model: nn.Module, async_op: bool) -> None:
    if async_op:
        idist.save(folder, model=model, async_op=True).wait()
    else:
        idist.save(folder, model=model)


def writes_too_much(folder: str, strategy: str, failing: int, async_op: bool) -> tuple[str, str]:
    """The system lets this rank write so much and no more; what it raises, torch's checkpoints pass on."""
    model = idist.auto_model(nn.Linear(400, 400), strategy=strategy)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    if idist.get_rank() == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, usual[1]))
    try:
        with pytest.raises(RuntimeError) as caught:
            save_and_wait(folder, model, async_op)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    idist.save(folder, model=model)
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize(("size", "strategy", "failing"), [(1, "ddp", 0), (2, "ddp", 0), (2, "fsdp", 1)])
@pytest.mark.parametrize("async_op", [False, True])
def test_a_disk_that_is_full_is_heard_by_all(
    tmp_path: Path, size: int, strategy: str, failing: int, async_op: bool
) -> None:
    told = ranks(size, writes_too_much, str(tmp_path), strategy, failing, async_op)
    assert [kind for kind, _ in told] == ["RuntimeError" if rank == failing else "PeerFailed" for rank in range(size)]
    for _, said in told:
        assert re.search(rf"\.00000001\S* cannot be written \(is the disk full\?\): rank {failing}: \w+Error: ", said)
    assert names(tmp_path) == ["00000001"]


@pytest.mark.parametrize("size", [20, None])
def test_a_damaged_file_of_tensors_is_an_error_that_names_the_checkpoint(tmp_path: Path, size: int | None) -> None:
    model = nn.Linear(2, 2)
    checkpoint = idist.save(tmp_path, model=model)
    if size is None:
        (checkpoint / "__0_0.distcp").unlink()
    else:
        os.truncate(checkpoint / "__0_0.distcp", size)
    with pytest.raises(RuntimeError, match=f"{checkpoint} cannot be read: (EOF|FileNotFound)Error"):
        idist.load(tmp_path, model=model)


def test_a_failure_in_the_background_is_heard_by_all(tmp_path: Path) -> None:
    assert ranks(2, fails_in_the_background, str(tmp_path)) == ["OSError", "PeerFailed"]
    assert idist.load(tmp_path) == {"step": 2}
    assert len(names(tmp_path)) == 1
