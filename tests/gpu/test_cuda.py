"""Backends, models and collectives on one CUDA device.

Every test runs in processes of its own: nccl takes one rank for each device, so it is alone; ranks that share the
device talk by gloo.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import LOOPBACK, free_port, run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import idist
from idist.errors import ConfigError

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

SECONDS = 60.0
COMPOSITE = "cpu:gloo,cuda:nccl"


def alone(fn: Callable[..., Any], *args: Any) -> Any:
    (result,) = run_ranks(fn, 1, *args, timeout=240)
    return result


def together(fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Two ranks that share one device."""
    port = free_port()
    env = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": port, "WORLD_SIZE": 2}
    return run_ranks(fn, 2, *args, env=lambda rank: {**env, "RANK": rank, "CUDA_VISIBLE_DEVICES": first()}, timeout=240)


def first() -> str:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def start(backend: str, **arguments: Any) -> None:
    idist.initialize(backend, rank=0, world_size=1, timeout=SECONDS, verify=True, **arguments)


def message(function: Callable[[], Any], error: type[Exception] = ConfigError) -> str:
    with pytest.raises(error) as caught:
        function()
    return str(caught.value)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
        self.register_buffer("table", torch.arange(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y


def places(model: nn.Module) -> set[str]:
    return {str(tensor.device) for tensor in [*model.parameters(), *model.buffers()]}


# Devices


def _devices(rank: int) -> dict[str, Any]:
    seen: dict[str, Any] = {"serial": str(idist.device())}
    for backend in ("nccl", "auto", COMPOSITE, "gloo", "cpu:gloo"):
        start(backend)
        seen[backend] = (idist.backend(), idist.model_name(), str(idist.device()), torch.cuda.current_device())
        idist.finalize()
    start("gloo", device="cuda")
    seen["gloo on cuda"] = str(idist.device())
    idist.finalize()
    last = torch.cuda.device_count() - 1
    start("nccl", device=f"cuda:{last}")
    seen["last"] = (str(idist.device()), torch.cuda.current_device()) == (f"cuda:{last}", last)
    idist.finalize()
    seen["too many"] = message(lambda: start("nccl", device=f"cuda:{last + 1}"))
    seen["not by nccl"] = message(lambda: start("nccl", device="cpu"))
    seen["after"] = (idist.backend(), dist.is_initialized())
    return seen


def test_devices() -> None:
    """KNOWN-FAILURES 24: gloo means CPU unless a device is asked for."""
    seen = alone(_devices)
    assert seen["nccl"] == seen["auto"] == ("nccl", "native-dist", "cuda:0", 0)
    assert seen[COMPOSITE][:3] == (COMPOSITE, "native-dist", "cuda:0")
    assert seen["gloo"][:3] == ("gloo", "native-dist", "cpu")
    assert seen["cpu:gloo"][:3] == ("cpu:gloo", "native-dist", "cpu")
    assert seen["gloo on cuda"] == "cuda:0"
    assert seen["last"]
    assert "visible" in seen["too many"]
    assert "device 'cpu' cannot be used with backend 'nccl'; here it serves: cuda" in seen["not by nccl"]
    assert seen["after"] == (None, False)
    assert seen["serial"].startswith("cuda")


def _by_hand(rank: int, backend: str | None, port: int) -> dict[str, Any]:
    torch.cuda.set_device(0)
    address = f"tcp://{LOOPBACK}:{port}"
    span = timedelta(seconds=SECONDS)
    dist.init_process_group(backend, init_method=address, rank=0, world_size=1, timeout=span)
    seen = {"backend": idist.backend(), "device": str(idist.device()), "local rank": idist.get_local_rank()}
    model = idist.auto_model(Net())
    seen["model"] = (type(model).__name__, places(model))
    seen["sum"] = (idist.all_reduce(2), idist.all_reduce(torch.ones(2, device="cuda")).tolist())
    idist.barrier()
    dist.destroy_process_group()
    seen["after"] = idist.backend()
    return seen


@pytest.mark.parametrize("backend", ["nccl", COMPOSITE, None])
def test_a_group_made_by_hand(backend: str | None) -> None:
    """KNOWN-FAILURES 1."""
    seen = alone(_by_hand, backend, free_port())
    assert seen["backend"] == (backend or COMPOSITE)
    assert (seen["device"], seen["local rank"]) == ("cuda:0", 0)
    assert seen["model"] == ("DistributedDataParallel", {"cuda:0"})
    assert seen["sum"] == (2, [1, 1])
    assert seen["after"] is None


# Collectives


def _collectives(rank: int, backend: str, device: str) -> list[str]:
    """What is wrong, with tensors on ``device``."""
    start(backend)
    wrong = []

    def check(name: str, got: Any, expected: Any) -> None:
        if isinstance(got, torch.Tensor) and isinstance(expected, torch.Tensor):
            same = got.device == expected.device and got.dtype == expected.dtype and got.shape == expected.shape
            fits = same and torch.equal(got, expected)
        else:
            fits = type(got) is type(expected) and got == expected
        if not fits:
            wrong.append(f"{name}: {got!r} instead of {expected!r}")

    dtypes = (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16)
    for dtype in (*dtypes, torch.float32, torch.float64, torch.complex64):
        for shape in ((), (0,), (3,), (2, 3), (1 << 16,)):
            t = torch.ones(shape, dtype=dtype, device=device)
            rows = t.view(1) if t.ndim == 0 else t
            what = f"{dtype} {shape} "
            check(what + "all_gather", idist.all_gather(t), rows)
            check(what + "broadcast", idist.broadcast(t), t)
            check(what + "gather", idist.gather(t), rows)
            check(what + "all_reduce", idist.all_reduce(t, "OR" if dtype is torch.bool else "SUM"), t)
            if t.ndim:
                check(what + "all_to_all", idist.all_to_all(t), t)
                op = "OR" if dtype is torch.bool else "SUM"
                check(what + "reduce_scatter", idist.reduce_scatter(t, op), t)
    t = torch.arange(6, device=device)
    for op in ("SUM", "PRODUCT", "MIN", "MAX", "AND", "OR"):
        check(op, idist.all_reduce(t, op), t)
    check("AVERAGE", idist.all_reduce(t.double(), "AVERAGE"), t.double())
    check("not contiguous", idist.all_gather(t.view(2, 3).t()), t.view(2, 3).t().contiguous())
    check("async", idist.all_reduce_(t.clone(), async_op=True).wait(), t)
    check("in place", idist.all_reduce_(t), t)
    check("in a group", idist.all_reduce(t, group=[0]), t)
    check("uneven", idist.all_gather(t, uneven=True), t)
    check("shapes", idist.all_gather_tensors_with_shapes(t, [(6,)])[0], t)
    check("safe", idist.broadcast(t, safe_mode=True), t)
    for value in (True, 2**62, 0.1, "é" * 1000, Path("a/b"), None, {"a": [1, (2.5, "x")]}):
        check("broadcast", idist.broadcast(value), value)
        check("all_gather", idist.all_gather(value), [value])
        check("gather", idist.gather(value), [value])
        check("scatter", idist.scatter([value]), value)
    for number in (2**62 + 1, 0.1):
        check("all_reduce", idist.all_reduce(number), number)
    with idist.one_rank_first():
        check("first", idist.one_rank_only(with_barrier=True)(lambda: 5)(), 5)
    idist.barrier()
    idist.finalize()
    return wrong


@pytest.mark.parametrize("backend", ["nccl", COMPOSITE, "gloo"])
@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_every_collective_on_one_rank(backend: str, device: str) -> None:
    """A tensor comes back on the device that it was on, whatever the backend moves."""
    assert alone(_collectives, backend, device) == []


def _shared(rank: int) -> dict[str, Any]:
    idist.initialize("gloo", device="cuda", timeout=SECONDS, verify=True)
    device = idist.device()
    t = torch.arange(4, device=device) + rank
    seen: dict[str, Any] = {"device": str(device), "local rank": idist.get_local_rank()}
    seen["all_reduce"] = idist.all_reduce(t).tolist()
    seen["all_gather"] = idist.all_gather(t).tolist()
    seen["broadcast"] = idist.broadcast(t, src=1).tolist()
    seen["all_to_all"] = idist.all_to_all(t).tolist()
    seen["reduce_scatter"] = idist.reduce_scatter(t).tolist()
    seen["where"] = str(idist.all_gather(t).device)
    seen["values"] = (idist.all_reduce(rank), idist.all_gather(f"rank {rank}"))
    idist.barrier()
    torch.manual_seed(rank)
    model = idist.auto_model(Net())
    seen["ids"] = model.device_ids
    optimizer = idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 8, device=device)).square().mean().backward()
        optimizer.step()
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    mine, other = idist.all_gather(flat).view(2, -1)
    seen["one model"] = torch.equal(mine, other)
    idist.finalize()
    return seen


def test_two_gloo_ranks_share_the_device_if_asked() -> None:
    """KNOWN-FAILURES 24."""
    for rank, seen in enumerate(together(_shared)):
        assert (seen["device"], seen["local rank"], seen["ids"]) == ("cuda:0", rank, [0])
        assert seen["all_reduce"] == [1, 3, 5, 7]
        assert seen["all_gather"] == [0, 1, 2, 3, 1, 2, 3, 4]
        assert seen["broadcast"] == [1, 2, 3, 4]
        assert seen["all_to_all"] == [[0, 1, 1, 2], [2, 3, 3, 4]][rank]
        assert seen["reduce_scatter"] == [[1, 3], [5, 7]][rank]
        assert seen["where"] == "cuda:0"
        assert seen["values"] == (1, ["rank 0", "rank 1"])
        assert seen["one model"]


def _sync_bn(rank: int) -> dict[str, Any]:
    idist.initialize("gloo", device="cuda", timeout=SECONDS)
    torch.manual_seed(0)
    data = torch.randn(8, 4, device=idist.device())
    layers = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    model = idist.auto_model(layers, sync_bn=True)
    out = model(data[rank::2])
    out.sum().backward()
    whole = nn.BatchNorm1d(4).to(idist.device())
    expected = layers[1](whole(data))[rank::2]
    seen = {
        "kind": type(model.module[0]).__name__,
        "forward": torch.allclose(out, expected, atol=1e-5),
        "mean": torch.allclose(model.module[0].running_mean, whole.running_mean, atol=1e-6),
    }
    idist.finalize()
    return seen


def test_sync_bn_has_the_statistics_of_all_ranks() -> None:
    for seen in together(_sync_bn):
        assert seen == {"kind": "SyncBatchNorm", "forward": True, "mean": True}


# Models


def _models(rank: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    model = Net()
    if torch.cuda.device_count() == 1:
        seen["serial"] = idist.auto_model(model) is model and places(model) == {"cuda:0"}
    else:
        seen["serial"] = isinstance(idist.auto_model(model), nn.DataParallel)
    start("nccl")
    wrapped = idist.auto_model(Net(), sync_bn=True)
    seen["nccl"] = (type(wrapped).__name__, places(wrapped), wrapped.device_ids)
    frozen = Net().requires_grad_(False)
    seen["frozen"] = idist.auto_model(frozen) is frozen and places(frozen) == {"cuda:0"}
    seen["explicit"] = idist.auto_model(Net(), device_ids=[0], output_device=0).output_device
    idist.finalize()
    start("gloo")
    wrapped = idist.auto_model(Net())
    seen["gloo"] = (type(wrapped).__name__, places(wrapped), wrapped.device_ids)
    idist.finalize()
    return seen


def test_models_move_whole_and_are_wrapped_for_their_device() -> None:
    """KNOWN-FAILURES 11: parameters and buffers move."""
    seen = alone(_models)
    assert seen["serial"]
    assert seen["nccl"] == ("DistributedDataParallel", {"cuda:0"}, [0])
    assert seen["frozen"]
    assert seen["explicit"] == 0
    assert seen["gloo"] == ("DistributedDataParallel", {"cpu"}, None)


def _amp(rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """Native AMP through idist, and by hand."""

    def train(wrap: Callable[[nn.Module], nn.Module]) -> tuple[torch.Tensor, float]:
        torch.manual_seed(0)
        model = wrap(Net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=dtype is torch.float16)
        data = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).cuda()
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cuda", dtype):
                out = model(data)
                loss = out.float().square().mean()
            assert out.dtype == dtype
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return nn.utils.parameters_to_vector(model.parameters()).detach().cpu(), float(loss)

    start("nccl")
    ours, loss = train(idist.auto_model)
    hand, _ = train(lambda model: DistributedDataParallel(model.cuda(), device_ids=[0]))
    idist.finalize()
    return {"equal": torch.equal(ours, hand), "finite": bool(torch.isfinite(ours).all()), "loss": loss}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_amp_equals_hand_written_torch(dtype: torch.dtype) -> None:
    seen = alone(_amp, dtype)
    assert seen["equal"]
    assert seen["finite"]
    assert seen["loss"] > 0


def _loader(rank: int) -> tuple[bool, str]:
    start("nccl")
    dataset = torch.utils.data.TensorDataset(torch.arange(8.0))
    loader = idist.auto_dataloader(dataset, batch_size=4)
    (batch,) = next(iter(loader))
    result = (batch.is_pinned(), str(batch.to(idist.device(), non_blocking=True).device))
    idist.finalize()
    return result


def test_batches_are_pinned() -> None:
    assert alone(_loader) == (True, "cuda:0")


def _prefetched(rank: int) -> list[str]:
    """What is wrong with batches that were copied ahead, while the device is busy with the one before."""
    start("nccl")
    side = 512
    images = torch.arange(40.0).view(-1, 1, 1).expand(-1, side, side).contiguous()
    data = [{"image": images[i], "name": f"{i}", "pair": (i, torch.tensor([i]))} for i in range(40)]
    loader = idist.auto_dataloader(data, batch_size=4, prefetch_to_device=True, num_workers=2)
    wrong, seen = [], 0
    for number, batch in enumerate(loader):
        image, (index, pair) = batch["image"], batch["pair"]
        if {image.device.type, index.device.type, pair.device.type} != {"cuda"}:
            wrong.append(f"batch {number} is on {image.device}, {index.device}, {pair.device}")
        busy = image
        for _ in range(20):
            busy = busy @ torch.eye(side, device="cuda")
        if not torch.equal(busy[:, 0, 0].cpu(), torch.arange(40.0)[seen : seen + 4]):
            wrong.append(f"batch {number} has {busy[:, 0, 0].tolist()}")
        seen += len(image)
        if loader.state_dict()["position"] != seen:
            wrong.append(f"position {loader.state_dict()['position']} after {seen} samples")
        if batch["name"] != [f"{i}" for i in range(seen - 4, seen)]:
            wrong.append(f"names {batch['name']}")
    idist.finalize()
    return wrong if seen == 40 else [*wrong, f"{seen} samples"]


def test_batches_are_on_the_device_ahead() -> None:
    assert alone(_prefetched) == []


# Processes


def _forks_after_cuda(rank: int) -> str:
    torch.ones(1, device="cuda")

    def launch() -> None:
        with idist.Parallel("gloo", nproc_per_node=2, start_method="fork") as parallel:
            parallel.run(print)

    return message(launch)


def test_fork_is_refused_where_cuda_is_in_use() -> None:
    """KNOWN-FAILURES 28."""
    said = alone(_forks_after_cuda)
    assert "this process has used cuda already, and a forked process cannot use it again" in said
    assert "start_method='forkserver'" in said


def _asking_uses_no_cuda(rank: int) -> bool:
    idist.device()
    idist.available_backends()
    idist.get_rank()
    return torch.cuda.is_initialized()


def test_what_only_asks_leaves_cuda_unused() -> None:
    """KNOWN-FAILURES 28: so that a notebook can fork afterwards."""
    assert alone(_asking_uses_no_cuda) is False


def where(local_rank: int) -> tuple[str, int]:
    return str(idist.device()), int(idist.all_reduce(torch.ones(1, device=idist.device())).item())


def test_processes_that_are_started_here_have_the_device() -> None:
    with idist.Parallel("nccl", nproc_per_node=1, timeout=SECONDS) as parallel:
        assert parallel.run(where) == [("cuda:0", 1)]
    with idist.Parallel("gloo", nproc_per_node=2, timeout=SECONDS) as parallel:
        assert parallel.run(where) == [("cpu", 2)] * 2
