"""accumulate and clip_grad_norm_, with models that every rank has and with sharded ones: as one process does it."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from processes import LOOPBACK, free_port, run_ranks
from torch import Tensor, nn

import idist
from idist.errors import ConfigError

BATCHES, EVERY = 7, 3  # the last step is of one batch alone


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def data(size: int) -> list[Tensor]:
    """Equal batches, of which each rank has its rows."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(12 // size * size, 4, generator=generator) for _ in range(BATCHES)]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def alone(clip: bool) -> tuple[list[list[float]], list[float]]:
    """Without idist: the mean over the batches of a step, all rows at once."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    norms = []
    batches = data(2)
    for start in range(0, BATCHES, EVERY):
        rows = torch.cat(batches[start : start + EVERY])
        optimizer.zero_grad()
        (model(rows) - rows.sum(1, keepdim=True)).square().mean().backward()
        if clip:
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
        optimizer.step()
    return [parameter.flatten().tolist() for parameter in model.parameters()], norms


def first_layer(module: nn.Module) -> bool:
    """A function that says which modules are sharded by themselves, and that processes can be told of."""
    return isinstance(module, nn.Linear) and module.out_features == 6


def together(rank: int, size: int, strategy: str, clip: bool, options: dict[str, Any]) -> Any:
    if size > 1:
        idist.initialize("gloo", rank=rank, world_size=size, timeout=30)
    model = idist.auto_model(net(), strategy=strategy, **options)
    optimizer = idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.5))
    norms, steps = [], []
    for step, batch in enumerate(data(2)):
        rows = batch.chunk(size)[rank]
        with idist.accumulate(model, step, every=EVERY, total=BATCHES) as micro:
            ((model(rows) - rows.sum(1, keepdim=True)).square().mean() * micro.scale).backward()
        if micro.last:
            steps.append(step)
            if clip:
                norms.append(idist.clip_grad_norm_(model, 0.1).item())
            optimizer.step()
            optimizer.zero_grad()
    weights = [whole(parameter.detach()).flatten().tolist() for parameter in model.parameters()]
    idist.finalize()
    return weights, norms, steps


def together_in_halves(
    rank: int, size: int, strategy: str, dtype: torch.dtype, options: dict[str, Any]
) -> list[list[Any]]:
    """autocast, GradScaler, accumulation and clipping at once; in the second step a batch of the last rank overflows.

    Returns, for each step: the norm, the scale after it, the weights.
    """
    if size > 1:
        idist.initialize("gloo", rank=rank, world_size=size, timeout=30)
    model = idist.auto_model(net(), strategy=strategy, **options)
    optimizer = idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.5))
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    said = []
    for step, batch in enumerate(data(2)):
        rows = batch.chunk(size)[rank]
        with idist.accumulate(model, step, every=EVERY, total=BATCHES) as micro:
            with torch.autocast("cpu", dtype):
                out = model(rows)
            assert out.dtype == dtype
            loss = (out.float() - rows.sum(1, keepdim=True)).square().mean() * micro.scale
            if step == EVERY and rank == size - 1:
                loss = loss * float("inf")
            scaler.scale(loss).backward()
        if micro.last:
            scaler.unscale_(optimizer)
            norm = idist.clip_grad_norm_(model, 0.1).item()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            said.append([norm, scaler.get_scale(), weights_of(model)])
    idist.finalize()
    return said


def weights_of(model: nn.Module) -> list[float]:
    return [value for parameter in model.parameters() for value in whole(parameter.detach()).flatten().tolist()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("strategy", "options"), [("ddp", {}), ("fsdp", {}), ("fsdp", {"wrap": nn.Linear})])
def test_in_halves_all_ranks_do_what_one_process_does(
    strategy: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    where = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": free_port()}
    said = run_ranks(together_in_halves, 2, 2, strategy, dtype, options, env=lambda rank: where, timeout=60)
    assert said[0][0] == said[1][0]
    expected = together_in_halves(0, 1, "ddp", dtype, {})
    for mine in said:
        assert [scale for _, scale, _ in mine] == [16.0, 8.0, 8.0], "the second step is skipped on all ranks"
        assert mine[0][2] == mine[1][2] != mine[2][2]
        for (norm, _, weights), (other, _, theirs) in zip(mine, expected, strict=True):
            assert norm == pytest.approx(other, rel=2e-2) or (not math.isfinite(other) and not math.isfinite(norm))
            assert weights == pytest.approx(theirs, abs=2e-3)


WORLDS = {
    "serial": (1, "ddp", {}),
    "serial fsdp": (1, "fsdp", {}),
    "ddp": (2, "ddp", {}),
    "fsdp": (2, "fsdp", {}),
    "fsdp by class": (2, "fsdp", {"wrap": nn.Linear}),
    "fsdp by function": (2, "fsdp", {"wrap": first_layer, "reshard_after_forward": False}),
    "fsdp offloaded": (2, "fsdp", {"cpu_offload": True, "wrap": 10}),
}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_equals_all_rows_at_once(world: str, clip: bool) -> None:
    size, strategy, options = WORLDS[world]
    if size == 1:
        said = [together(0, 1, strategy, clip, options)]
    else:
        where = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": free_port()}
        said = run_ranks(together, size, size, strategy, clip, options, env=lambda rank: where, timeout=60)
    weights, norms = alone(clip)
    for mine, my_norms, steps in said:
        assert steps == [2, 5, 6]
        assert my_norms == pytest.approx(norms, rel=1e-5)
        assert [len(values) for values in mine] == [len(values) for values in weights]
        for ours, theirs in zip(mine, weights, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def counts_reductions(rank: int) -> list[int]:
    idist.initialize("gloo", rank=rank, world_size=2, timeout=30)
    model = idist.auto_model(net())
    reductions = 0

    def counting(state, bucket):  # type: ignore[no-untyped-def]  # torch wants no annotations but its own
        nonlocal reductions
        reductions += 1
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, counting)  # type: ignore[operator]
    counts = []
    for step in range(4):
        with idist.accumulate(model, step, every=2):
            model(torch.ones(2, 4)).sum().backward()
        counts.append(reductions)
    idist.finalize()
    return counts


def test_only_the_last_reduces() -> None:
    where = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": free_port()}
    counts = run_ranks(counts_reductions, 2, env=lambda rank: where, timeout=60)
    assert counts[0] == counts[1]
    first, second, third, fourth = counts[0]
    assert (first, third) == (0, second)
    assert fourth == 2 * second > 0


@pytest.mark.parametrize(
    ("step", "every", "total", "places"),
    [
        (range(5), 1, None, [(1.0, True)] * 5),
        (range(4), 2, None, [(0.5, False), (0.5, True)] * 2),
        (range(3), 2, 3, [(0.5, False), (0.5, True), (1.0, True)]),
        (range(2), 4, 2, [(0.5, False), (0.5, True)]),
    ],
)
def test_places(step: range, every: int, total: int | None, places: list[tuple[float, bool]]) -> None:
    found = []
    for number in step:
        with idist.accumulate(nn.Linear(1, 1), number, every=every, total=total) as micro:
            found.append((micro.scale, micro.last))
    assert found == places


@pytest.mark.parametrize(("step", "every", "total"), [(-1, 2, None), (0, 0, None), (0, 1.5, None), (3, 2, 3)])
def test_numbers_that_cannot_be(step: int, every: Any, total: int | None) -> None:
    with (
        pytest.raises(ConfigError, match=r"accumulate: .* must be an integer of at least"),
        idist.accumulate(nn.Linear(1, 1), step, every=every, total=total),
    ):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "fdsp"}, r"strategy 'fdsp' is unknown; expected one of ddp, fsdp, none. Did you mean 'fsdp'\?"),
        ({"strategy": "none", "sync_bn": True}, "strategy='none' wraps nothing"),
        ({"strategy": "fsdp", "warp": 1}, r"does not know the argument 'warp'. Did you mean 'wrap'\?"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        idist.auto_model(net(), **options)


SHARDING = {
    "wrap": ({"wrap": nn.Conv2d}, "fits no module of the model; it has Linear, Sequential, Tanh"),
    "wrap of nothing": ({"wrap": "Linear"}, "wrap is a class of modules or several, a number of parameters"),
    "precision": ({"mixed_precision": torch.int8}, "mixed_precision is a type to compute in"),
}


def sharding(rank: int) -> dict[str, str]:
    """What goes wrong, and in what type a sharded model computes; rank 1's own weights count nothing."""
    idist.initialize("gloo", rank=rank, world_size=2, timeout=30)
    said = {}
    for name, (options, _) in SHARDING.items():
        with pytest.raises(ConfigError) as caught:
            idist.auto_model(net(), strategy="fsdp", **options)
        said[name] = str(caught.value)
    torch.manual_seed(rank)
    model = idist.auto_model(nn.Sequential(nn.Linear(4, 6)), strategy="fsdp", mixed_precision=torch.bfloat16)
    said["weights"] = str([whole(parameter.detach()).tolist() for parameter in model.parameters()])
    said["types"] = str({parameter.dtype for parameter in model.parameters()})
    said["computes in"] = str(model(torch.ones(1, 4)).dtype)
    with pytest.raises(ConfigError) as caught:
        idist.auto_model(model, strategy="fsdp")
    said["twice"] = str(caught.value)
    idist.finalize()
    return said


def test_sharding() -> None:
    where = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": free_port()}
    first, second = run_ranks(sharding, 2, env=lambda rank: where, timeout=60)
    assert first == second
    for name, (_, message) in SHARDING.items():
        assert message in first[name]
    torch.manual_seed(0)
    linear = nn.Linear(4, 6)
    assert first["weights"] == str([parameter.tolist() for parameter in linear.parameters()])
    assert (first["computes in"], first["types"]) == ("torch.bfloat16", "{torch.float32}")
    assert "the model is wrapped already" in first["twice"]


def overflows(rank: int, strategy: str) -> list[tuple[float, bool]]:
    """A scale, and whether the step was made; the second step overflows in what one rank alone holds."""
    idist.initialize("gloo", rank=rank, world_size=2, timeout=30)
    torch.manual_seed(0)
    model = idist.auto_model(nn.Sequential(nn.Linear(4, 6, bias=False)), strategy=strategy)
    optimizer = idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    said = []
    for step in range(3):
        optimizer.zero_grad()
        out = model(torch.ones(2, 4))
        if step == 1 and (strategy == "fsdp" or rank == 0):
            out = out * torch.tensor([float("inf"), *[1.0] * 5])
        scaler.scale(out.sum()).backward()
        before = [whole(parameter.detach()).clone() for parameter in model.parameters()]
        scaler.unscale_(optimizer)
        norm = idist.clip_grad_norm_(model, 1.0)
        assert norm.isinf() == (step == 1)
        scaler.step(optimizer)
        scaler.update()
        after = [whole(parameter.detach()) for parameter in model.parameters()]
        said.append((scaler.get_scale(), not all(map(torch.equal, before, after))))
    idist.finalize()
    return said


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_ranks_agree_on_an_overflow(strategy: str) -> None:
    where = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": free_port()}
    said = run_ranks(overflows, 2, strategy, env=lambda rank: where, timeout=60)
    assert said == [[(16.0, True), (8.0, False), (8.0, True)]] * 2


ENDS = """
import atexit, gc, weakref
gc.disable()
models = []
atexit.register(lambda: print("gone" if models[0]() is None else "there"))  # after what idist registers
import torch, idist

def training(local_rank):
    model = idist.auto_model(torch.nn.Linear(2, 2), strategy="fsdp")
    model(torch.ones(1, 2)).sum().backward()
    models.append(weakref.ref(model))

idist.initialize("gloo", rank=0, world_size=1)
training(0)
idist.finalize()
"""


def test_a_sharded_model_is_gone_before_the_interpreter_ends() -> None:
    """It is full of cycles and holds the process group, whose threads would abort one exit in fifteen."""
    ended = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "gone\n"), ended.stderr
