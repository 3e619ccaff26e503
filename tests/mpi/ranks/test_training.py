"""What torch builds on process groups."""

from __future__ import annotations

from collections.abc import Iterator
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import idist
from idist import runtime

STEPS = 10


def network() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.5)
    return model


def batches(rank: int, size: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    whole = [(torch.rand(4 * size, 8, generator=generator), torch.rand(4 * size, 4, generator=generator))] * STEPS
    return [(x.chunk(size)[rank], y.chunk(size)[rank]) for x, y in whole]


def train(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, y in data:
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [
        parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        for parameter in model.parameters()
    ]


@pytest.fixture
def alone(size: int) -> list[Tensor]:
    """The weights after the same training in one process."""
    model = network()
    train(model, batches(0, 1) if size == 1 else [(x, y) for x, y in _joined(size)])
    return weights(model)


def _joined(size: int) -> list[tuple[Tensor, Tensor]]:
    parts = [batches(rank, size) for rank in range(size)]
    return [(torch.cat([x for x, _ in step]), torch.cat([y for _, y in step])) for step in zip(*parts, strict=True)]


def near(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_ddp_equals_gloo(rank: int, size: int, alone: list[Tensor]) -> None:
    gloo = dist.new_group(backend="gloo")
    ours, theirs = idist.auto_model(network()), DistributedDataParallel(network(), process_group=gloo)
    train(ours, batches(rank, size))
    train(theirs, batches(rank, size))
    near(weights(ours), weights(theirs), 1e-6)
    near(weights(ours), alone, 1e-5)
    begun = runtime.current().backend.begun()  # what the watch asks, which knows nothing of whose group it is
    names = dist.distributed_c10d._world.pg_names
    assert begun[names[gloo]] > 0
    assert begun[names[dist.group.WORLD]] > 0
    del theirs  # torch may hang if a model outlives its group
    dist.destroy_process_group(gloo)


def test_ddp_accumulates_with_no_sync(rank: int, size: int) -> None:
    model = idist.auto_model(network())
    x, y = batches(rank, size)[0]
    with model.no_sync():
        (model(x) - y).square().mean().backward()
    own = [parameter.grad.clone() for parameter in model.parameters()]
    assert any(idist.all_reduce(float(grad.sum()), "MAX") != float(grad.sum()) or rank for grad in own)
    (model(x) - y).square().mean().backward()
    for parameter in model.parameters():
        torch.testing.assert_close(idist.all_reduce(parameter.grad, "AVERAGE"), parameter.grad)


def test_join_with_uneven_inputs(rank: int, size: int) -> None:
    model = idist.auto_model(network())
    with Join([model]):
        for x, y in batches(rank, size)[: rank + 1]:
            (model(x) - y).square().mean().backward()
            model.zero_grad()


def test_fsdp2_equals_one_process(rank: int, size: int, alone: list[Tensor]) -> None:
    model = network()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    train(model, batches(rank, size))
    near(weights(model), alone, 1e-5)


@pytest.fixture
def folder(rank: int) -> Iterator[str]:
    """One for all ranks; those of pytest are in the way of each other where several of it run at once."""
    with TemporaryDirectory() as own:
        yield idist.broadcast(own)
        idist.barrier()


def test_checkpoint(rank: int, size: int, folder: str) -> None:
    sharded = {"model": fully_shard(network()).state_dict(), "step": 3}
    dcp.save(sharded, checkpoint_id=folder)
    read = fully_shard(network())
    with torch.no_grad():
        for parameter in read.parameters():
            parameter.zero_()
    state = {"model": read.state_dict(), "step": 0}
    dcp.load(state, checkpoint_id=folder)
    assert state["step"] == 3
    near(weights(read), weights(network()), 0)


WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "ddp": ({"strategy": "ddp"}, 1e-5),
    "fsdp": ({"strategy": "fsdp"}, 1e-5),
    "fsdp by class, offloaded": ({"strategy": "fsdp", "wrap": nn.Linear, "cpu_offload": True}, 1e-5),
    "fsdp by size, in bfloat16": ({"strategy": "fsdp", "wrap": 100, "mixed_precision": torch.bfloat16}, 1e-2),
}
"""How a model is wrapped, and how far its weights may then be from those of one process."""


@pytest.mark.parametrize("way", WAYS)
def test_all_that_is_ours(rank: int, size: int, alone: list[Tensor], folder: str, way: str) -> None:
    """Sharding, accumulation, clipping and checkpoints: what was saved half way ends as what was not."""
    data = batches(rank, size)
    options, tolerance = WAYS[way]

    def some(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            for part, (x, y) in enumerate(zip(data[step][0].chunk(2), data[step][1].chunk(2), strict=True)):
                with idist.accumulate(model, part, every=2) as micro:
                    ((model(x) - y).square().mean() * micro.scale).backward()
            assert idist.clip_grad_norm_(model, 1e6) > 0
            optimizer.step()
            optimizer.zero_grad()

    ended = []
    for begins in (0, 5):
        model = idist.auto_model(network(), **options)
        optimizer = idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        some(model, optimizer, range(begins))
        if begins:
            assert idist.load(folder, model=model, optimizer=optimizer) == {"step": 5}
        else:
            some(model, optimizer, range(5))
            idist.save(folder, model=model, optimizer=optimizer, step=5)
        some(model, optimizer, range(5, STEPS))
        ended.append(weights(model))
    near(ended[0], alone, tolerance)
    near(ended[1], ended[0], 0)


def test_device_mesh_and_dtensor(rank: int, size: int) -> None:
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("a", "b"))
    assert mesh.size() == size
    assert mesh["a"].size() == 2
    whole = torch.arange(8.0 * size).view(2 * size, 4)
    line = init_device_mesh("cpu", (size,))
    sharded = distribute_tensor(whole, line, [Shard(0)])
    assert sharded.to_local().tolist() == whole.chunk(size)[rank].tolist()
    columns = sharded.redistribute(line, [Shard(1)])
    assert columns.full_tensor().tolist() == whole.tolist()
    assert sharded.redistribute(line, [Replicate()]).to_local().tolist() == whole.tolist()
    assert sharded.sum().full_tensor().item() == whole.sum().item()


def test_functional_collectives(rank: int, size: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    mine = torch.full((size, 2), float(rank))
    total = float(sum(range(size)))
    assert functional.all_reduce(mine, "sum", group).tolist() == [[total] * 2] * size
    gathered = functional.all_gather_single(mine, 0, group)
    assert gathered[:, 0].tolist() == [float(other) for other in range(size) for _ in range(size)]
    assert functional.reduce_scatter_single(mine, "sum", 0, group).tolist() == [[total] * 2]
    exchanged = functional.all_to_all_single(mine, None, None, group)
    assert exchanged[:, 0].tolist() == [float(other) for other in range(size)]
