"""A run that was saved and taken up again is the run that was not: bit for bit, and on other ranks and wrappers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from processes import LOOPBACK, free_port, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import idist

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adam": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
}


class Net(nn.Module):
    """Batch norm has buffers, one of an integer type; the last layer is given its optimizer settings apart."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y


def wrapped(model: nn.Module, wrapper: str) -> nn.Module:
    if wrapper == "fsdp":
        mesh = init_device_mesh("cpu", (idist.get_world_size(),))
        return fully_shard(model, mesh=mesh)
    if wrapper == "compiled":
        model = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
    return idist.auto_model(model)


def made(wrapper: str, optimizer: str, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(seed)
    net = Net()
    model = wrapped(net, wrapper)
    groups = [{"params": net.body.parameters(), "weight_decay": 0.01}, {"params": net.head.parameters()}]
    stepping = OPTIMIZERS[optimizer](groups)  # type: ignore[no-untyped-call]
    return model, stepping, torch.optim.lr_scheduler.StepLR(stepping, 2, gamma=0.5)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, count: int) -> None:
    """Each with data of this rank, out of all the generators that there are."""
    for _ in range(count):
        x = torch.randn(8, 6) + random.random() + float(numpy.random.rand())
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        scheduler.step()


def state(model: nn.Module) -> dict[str, list[Any]]:
    """All of it, by names that do not depend on wrappers."""
    whole = {}
    for name, value in model.state_dict().items():
        plain = name.removeprefix("module.").replace("_orig_mod.", "")
        whole[plain] = (value.full_tensor() if isinstance(value, DTensor) else value).tolist()
    return whole


def weights(model: nn.Module) -> dict[str, list[Any]]:
    """What all ranks have alike, at any time."""
    return {name: values for name, values in state(model).items() if name.endswith(("weight", "bias"))}


def save_and_go_on(folder: str, wrapper: str, optimizer: str) -> dict[str, Any]:
    parts = model, stepping, scheduler = made(wrapper, optimizer)
    torch.manual_seed(idist.get_rank())
    random.seed(idist.get_rank())
    numpy.random.seed(idist.get_rank())
    steps(*parts, 3)
    before = state(model)
    idist.save(folder, model=model, optimizer=stepping, scheduler=scheduler, step=3)
    assert state(model) == before
    steps(*parts, 3)
    return {"saved": before, "end": state(model), "weights": weights(model), "lr": scheduler.get_last_lr()}


def load_and_go_on(folder: str, wrapper: str, optimizer: str) -> dict[str, Any]:
    parts = model, stepping, scheduler = made(wrapper, optimizer, seed=5)
    if wrapper != "fsdp":  # gradients of another life
        model(torch.randn(8, 6)).sum().backward()
    values = idist.load(folder, model=model, optimizer=stepping, scheduler=scheduler)
    assert values == {"step": 3}
    loaded = state(model)
    steps(*parts, 3)
    return {"saved": loaded, "end": state(model), "weights": weights(model), "lr": scheduler.get_last_lr()}


def on_ranks(rank: int, size: int, what: Any, *args: Any) -> Any:
    idist.initialize("gloo", rank=rank, world_size=size, timeout=30)
    try:
        return what(*args)
    finally:
        idist.finalize()


def ranks(size: int, what: Any, *args: Any) -> list[Any]:
    port = free_port()
    where = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": port}
    return run_ranks(on_ranks, size, size, what, *args, env=lambda rank: where, timeout=80)


# torch's Adafactor does not work on sharded parameters.
WAYS = [(wrapper, optimizer) for wrapper in ("ddp", "fsdp", "compiled") for optimizer in OPTIMIZERS]
WAYS.remove(("fsdp", "Adafactor"))


@pytest.mark.parametrize(("wrapper", "optimizer"), WAYS)
def test_on_as_many_ranks_bit_for_bit(tmp_path: Path, wrapper: str, optimizer: str) -> None:
    through = ranks(2, save_and_go_on, str(tmp_path), wrapper, optimizer)
    again = ranks(2, load_and_go_on, str(tmp_path), wrapper, optimizer)
    assert again[0] == through[0]
    for loaded, went_on in zip(again, through, strict=True):
        assert loaded["weights"] == went_on["weights"] == through[0]["weights"]
        assert loaded["saved"] == through[0]["saved"], "running statistics too are those of rank 0"


@pytest.mark.parametrize("optimizer", ["momentum", "Adam"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "ddp"), (1, "ddp")),
        ((1, "ddp"), (3, "ddp")),
        ((2, "fsdp"), (3, "fsdp")),
        ((2, "fsdp"), (1, "compiled")),
        ((2, "compiled"), (2, "fsdp")),
    ],
    ids=lambda pair: "-".join(map(str, pair)),
)
def test_on_other_ranks_and_wrappers(
    tmp_path: Path, before: tuple[int, str], after: tuple[int, str], optimizer: str
) -> None:
    """What is loaded is what was saved; how it goes on depends on the data of so many ranks."""
    (size, wrapper), (others, another) = before, after
    saved = ranks(size, save_and_go_on, str(tmp_path), wrapper, optimizer)[0]
    for loaded in ranks(others, load_and_go_on, str(tmp_path), another, optimizer):
        assert loaded["saved"] == saved["saved"]
        assert loaded["lr"] == saved["lr"]


def optimizer_states(folder: str, wrapper: str) -> list[Any]:
    model, stepping, scheduler = made(wrapper, "Adam")
    if not Path(folder).exists():
        steps(model, stepping, scheduler, 2)
        idist.save(folder, model=model, optimizer=stepping)
    else:
        idist.load(folder, model=model, optimizer=stepping)
    found = []
    for parameter in (parameter for group in stepping.param_groups for parameter in group["params"]):
        values = stepping.state[parameter]
        whole = {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in values.items()}
        found.append({key: value.tolist() for key, value in whole.items()})
    return found


def test_the_states_of_an_optimizer_find_their_parameters(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    (saved, _) = ranks(2, optimizer_states, folder, "fsdp")
    assert all(values["step"] == 2 for values in saved)
    for size, wrapper in ((1, "ddp"), (2, "fsdp"), (3, "fsdp")):
        assert ranks(size, optimizer_states, folder, wrapper) == [saved] * size


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def trained_with_momentum(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    torch.manual_seed(1)
    norms = []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().mean().backward()
        norms.append(idist.clip_grad_norm_(model, 0.01).item())
        optimizer.step()
    return norms


def tensor_parallel(folder: str) -> list[float]:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(layers(), init_device_mesh("cpu", (2,)), plan)
    for strategy in ("ddp", "fsdp"):
        with pytest.raises(idist.ConfigError, match=r"0\.weight is spread over ranks already.* strategy='none'"):
            idist.auto_model(model, strategy=strategy)
    assert idist.auto_model(model, strategy="none") is model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    norms = trained_with_momentum(model, optimizer)
    idist.save(folder, model=model, optimizer=optimizer)
    return norms


def test_a_tensor_parallel_model_is_clipped_and_saved_as_the_plain_one(tmp_path: Path) -> None:
    first, second = ranks(2, tensor_parallel, str(tmp_path))
    model = layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    assert first == second == pytest.approx(trained_with_momentum(model, optimizer))
    loaded = layers()
    stepping = torch.optim.SGD(loaded.parameters(), lr=0.1, momentum=0.9)
    idist.load(tmp_path, model=loaded, optimizer=stepping)
    for mine, other in zip(loaded.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
        torch.testing.assert_close(stepping.state[mine]["momentum_buffer"], optimizer.state[other]["momentum_buffer"])
