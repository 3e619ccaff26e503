"""auto_model: what it moves, wraps, passes on and refuses."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from processes import LOOPBACK, free_port, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import idist
from idist import runtime
from idist.backends.base import Backend
from idist.backends.c10d import C10d
from idist.backends.serial import Serial
from idist.errors import ConfigError
from idist.runtime import Context
from idist.testing import run_threads
from idist.topology import SERIAL, Topology


@contextmanager
def one_rank() -> Iterator[None]:
    idist.initialize("gloo", rank=0, world_size=1)
    try:
        yield
    finally:
        idist.finalize()


@contextmanager
def on(backend: Backend, topology: Topology = SERIAL) -> Iterator[None]:
    with runtime.thread_context(Context(backend, topology, owned=True)):
        yield


def address(port: int) -> dict[str, object]:
    return {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": port}


class Elsewhere(Serial):
    """Alone, with a device that is not where models are made, also on a machine without one."""

    def device(self) -> torch.device:
        return torch.device("meta")


class Net(nn.Module):
    """Parameters and buffers: a persistent one, one that is not, and one without gradients of an integer type."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.register_buffer("table", torch.arange(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def test_parameters_and_buffers_move() -> None:
    """KNOWN-FAILURES 11."""
    model = Net()
    with on(Elsewhere()):
        moved = idist.auto_model(model)
    tensors = dict([*moved.named_parameters(), *moved.named_buffers()])
    assert {"layers.0.weight", "layers.1.running_mean", "layers.1.num_batches_tracked", "table", "scratch"} <= set(
        tensors
    )
    assert {str(tensor.device) for tensor in tensors.values()} == {"meta"}
    assert moved.table.dtype == torch.int64


@pytest.mark.parametrize(
    "made", [nn.Identity, nn.Flatten, lambda: frozen(Net()), lambda: nn.BatchNorm1d(2, affine=False)]
)
def test_the_buffers_of_a_model_without_trainable_parameters_move_too(made: Any) -> None:
    """KNOWN-FAILURES 11 and 22."""
    model = made()
    with on(Elsewhere()):
        assert idist.auto_model(model) is model
    assert {str(tensor.device) for tensor in [*model.parameters(), *model.buffers()]} <= {"meta"}


def test_alone_the_model_comes_back_itself() -> None:
    model = Net()
    assert idist.auto_model(model) is model
    assert idist.auto_model(model, sync_bn=True, find_unused_parameters=True) is model


class Everywhere(nn.Linear):
    """Stays where it is, whatever device it is sent to."""

    def to(self, *args: Any, **kwargs: Any) -> "Everywhere":
        return self


@pytest.mark.parametrize("count", [1, 2])
def test_one_process_with_several_devices_uses_data_parallel(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []

    def data_parallel(model: nn.Module, **options: Any) -> nn.Module:
        made.append(options)
        return nn.Sequential(model)

    monkeypatch.setattr("idist.backends.serial.DataParallel", data_parallel)
    monkeypatch.setattr(Serial, "device", lambda self: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    model = Everywhere(1, 1)
    wrapped = idist.auto_model(model, dim=1)
    assert (wrapped is model, made) == ((True, []) if count == 1 else (False, [{"dim": 1}]))


def test_what_ddp_gets() -> None:
    model = Net()
    with one_rank():
        wrapped = idist.auto_model(model, find_unused_parameters=True, gradient_as_bucket_view=True, bucket_cap_mb=3)
        assert type(wrapped) is DistributedDataParallel
        assert wrapped.module is model
        assert (wrapped.find_unused_parameters, wrapped.gradient_as_bucket_view) == (True, True)
        assert wrapped.bucket_bytes_cap == 3 * 2**20
        assert wrapped.device_ids is None


def test_what_nobody_knows_raises_also_alone() -> None:
    """One contract at every world size."""
    with pytest.raises(TypeError, match="find_unused_parametres"):
        idist.auto_model(Net(), find_unused_parametres=True)
    with one_rank(), pytest.raises(TypeError, match="find_unused_parametres"):
        idist.auto_model(Net(), find_unused_parametres=True)
    with pytest.raises(TypeError, match="find_unused_parametres"):
        run_threads(lambda: idist.auto_model(Net(), find_unused_parametres=True), 2)


@pytest.mark.parametrize("model", [None, "net", Net, torch.ones(1)])
def test_only_modules(model: Any) -> None:
    with pytest.raises(TypeError, match=r"auto_model takes a torch\.nn\.Module, got"):
        idist.auto_model(model)


def test_frozen_models_pass_through() -> None:
    """KNOWN-FAILURES 22."""
    model = frozen(Net())
    with one_rank():
        assert idist.auto_model(model) is model
        assert idist.auto_model(model, sync_bn=True) is model
        partly = frozen(Net())
        partly.layers[0].bias.requires_grad_(True)  # type: ignore[union-attr,index]
        assert type(idist.auto_model(partly)) is DistributedDataParallel


def test_sync_bn_converts() -> None:
    """That it also works is a test for a GPU: torch refuses these layers on the CPU."""
    with one_rank():
        with pytest.raises(ValueError, match="SyncBatchNorm layers only work with GPU modules"):
            idist.auto_model(Net(), sync_bn=True)
        plain = idist.auto_model(Net())
        assert nn.SyncBatchNorm not in [type(module) for module in plain.modules()]
        without = idist.auto_model(nn.Linear(1, 1), sync_bn=True)
        assert type(without) is DistributedDataParallel


class Negligent(C10d):
    """Talks, but leaves models as they are."""

    def wrap_model(self, model: nn.Module, *, sync_bn: bool, **options: Any) -> nn.Module:
        return model


@pytest.mark.parametrize("world_size", [1, 2])
def test_never_silently_not_distributed(world_size: int) -> None:
    model = Net()
    topology = Topology("test", 0, world_size, 0, world_size, 0, 1)
    with on(Negligent("gloo"), topology):
        assert idist.auto_model(frozen(Net())) is not None
        if world_size == 1:
            assert idist.auto_model(model) is model
        else:
            with pytest.raises(
                ConfigError, match="does not synchronise the gradients of a model, and there are 2 ranks"
            ):
                idist.auto_model(model)


def _trains(rank: int) -> dict[str, Any]:
    """Several ways to train, on each rank with data of its own; the weights after it, on all ranks."""
    idist.initialize("gloo", rank=rank, world_size=2, timeout=20)
    seen = {}
    for way in (plain, autocast, scaled, compiled, patched):
        torch.manual_seed(rank)
        weights = way(torch.randn(8, 3))
        seen[way.__name__] = idist.all_gather(weights).view(2, -1).tolist()
    torch.manual_seed(rank)
    model = idist.auto_model(frozen(Net()))
    seen["frozen"] = type(model).__name__
    idist.finalize()
    return seen


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _flat(model: nn.Module) -> torch.Tensor:
    buffers = [buffer.double().flatten() for name, buffer in model.named_buffers() if "running" not in name]
    return torch.cat([*(p.detach().double().flatten() for p in model.parameters()), *buffers])


def plain(data: torch.Tensor) -> torch.Tensor:
    model = idist.auto_model(Net())
    optimizer = idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        _step(model, optimizer, model(data).square().mean())
    return _flat(model)


def autocast(data: torch.Tensor) -> torch.Tensor:
    model = idist.auto_model(Net())
    optimizer = idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            out = model(data)
            assert out.dtype == torch.bfloat16
            loss = out.float().square().mean()
        _step(model, optimizer, loss)
    return _flat(model)


def scaled(data: torch.Tensor) -> torch.Tensor:
    model = idist.auto_model(Net())
    optimizer = idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(data).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**10
    return _flat(model)


def compiled(data: torch.Tensor) -> torch.Tensor:
    # As in eager mode, what the compiler sees: no C++ compiler is needed.
    model = idist.auto_model(torch.compile(Net(), backend="aot_eager"))  # type: ignore[arg-type]
    assert type(model) is DistributedDataParallel
    optimizer = idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        _step(model, optimizer, model(data).square().mean())
    return _flat(model)


def patched(data: torch.Tensor) -> torch.Tensor:
    """As apex's amp leaves them: ``forward`` and ``step`` replaced on the objects, and a stash beside ``step``.

    apex itself is in no package index and wants a CUDA device.
    """
    bare = Net()
    bare_optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
    forward, step, calls = bare.forward, bare_optimizer.step, {"forward": 0, "step": 0}

    def counted_forward(x: torch.Tensor) -> torch.Tensor:
        calls["forward"] += 1
        return forward(x.float())

    def counted_step(closure: Any = None) -> Any:
        calls["step"] += 1
        return step(closure)

    bare.forward = counted_forward  # type: ignore[method-assign]
    bare_optimizer.step = counted_step  # type: ignore[method-assign]
    bare_optimizer._amp_stash = calls  # type: ignore[attr-defined]
    model, optimizer = idist.auto_model(bare), idist.auto_optim(bare_optimizer)
    assert optimizer._amp_stash is calls  # type: ignore[attr-defined]
    for _ in range(3):
        _step(model, optimizer, model(data.double()).square().mean())
    assert calls == {"forward": 3, "step": 3}
    return _flat(model)


def test_the_ranks_train_one_model() -> None:
    port = free_port()
    first, second = run_ranks(_trains, 2, env=lambda rank: address(port), timeout=60)
    assert first == second
    start = torch.nn.utils.parameters_to_vector(_seeded(0).parameters())
    for way in ("plain", "autocast", "scaled", "compiled", "patched"):
        mine, others = map(torch.tensor, first[way])
        assert torch.equal(mine, others), way
        trained = mine[: len(start)]
        assert not torch.allclose(trained, start, atol=1e-4), f"{way} has not trained"
        assert torch.allclose(trained, torch.tensor(first["plain"][0])[: len(start)], atol=2e-2), way
    assert first["plain"] == first["compiled"] == first["patched"]
    assert first["frozen"] == "Net"


def _seeded(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    torch.randn(8, 3)
    return Net()
