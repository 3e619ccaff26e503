"""A run through idist gives, bit by bit, the weights of the same run written by hand with torch."""

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import LOOPBACK, free_port, run_ranks
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import idist

EPOCHS = 3
BATCH = 4  # of each rank

# A group whose last reference is the model's may hang when the model goes: https://github.com/pytorch/pytorch/issues/56297
KEPT: list[Any] = []


def digits() -> TensorDataset:
    """50 images: not a multiple of any batch size or world size here."""
    generator = torch.Generator().manual_seed(7)
    return TensorDataset(torch.randn(50, 1, 8, 8, generator=generator), torch.randint(10, (50,), generator=generator))


def cnn(rank: int) -> nn.Module:
    torch.manual_seed(rank)  # so the weights of rank 0 have to reach the others
    features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(features, nn.Flatten(), nn.Linear(4 * 36, 16), nn.ReLU(), nn.Linear(16, 10))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any]) -> dict[str, Any]:
    """The user's own loop; a digest of the samples of every step and of the weights after every epoch."""
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    samples, weights = [], []
    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for images, labels in loader:
            samples.append(digest([images, labels]))
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
        scheduler.step()
        weights.append(digest(model.state_dict().values()))
    return {"samples": samples, "weights": weights, "optimizer": digest(states(optimizer))}


def states(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for state in optimizer.state_dict()["state"].values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def digest(tensors: Any) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def by_hand(rank: int, world_size: int, port: int) -> dict[str, Any]:
    dist.init_process_group("gloo", init_method=f"tcp://{LOOPBACK}:{port}", rank=rank, world_size=world_size)
    model = DistributedDataParallel(cnn(rank))
    dataset = digits()
    loader = DataLoader(dataset, batch_size=BATCH, sampler=DistributedSampler(dataset, shuffle=True))
    seen = train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loader)
    KEPT.append(dist.group.WORLD)
    dist.destroy_process_group()
    return seen


def with_idist(rank: int, world_size: int, port: int) -> dict[str, Any]:
    idist.initialize("gloo", init_method=f"tcp://{LOOPBACK}:{port}", rank=rank, world_size=world_size, timeout=30)
    model = idist.auto_model(cnn(rank))
    dataset = digits()
    loader = idist.auto_dataloader(dataset, batch_size=BATCH * world_size, sampler=DistributedSampler(dataset))
    optimizer = idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    seen = train(model, optimizer, loader)
    idist.finalize()
    return seen


def _both(rank: int, world_size: int, ports: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    return by_hand(rank, world_size, ports[0]), with_idist(rank, world_size, ports[1])


@pytest.mark.parametrize("world_size", [2, 3])
def test_training_equals_hand_written_torch(world_size: int) -> None:
    results = run_ranks(_both, world_size, world_size, [free_port(), free_port()], timeout=60)
    for hand, ours in results:
        assert ours["samples"] == hand["samples"]
        assert ours["weights"] == hand["weights"]
        assert ours["optimizer"] == hand["optimizer"]
        assert len(set(hand["weights"])) == EPOCHS, "it has not trained"
    assert len({str(hand["samples"]) for hand, _ in results}) == world_size, "each rank has samples of its own"
    assert len({hand["optimizer"] for hand, _ in results}) == 1


def test_one_process_equals_plain_torch() -> None:
    def run(model: nn.Module, loader: DataLoader[Any]) -> dict[str, Any]:
        return train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loader)

    dataset = digits()
    sampler = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True)
    plain = run(cnn(0), DataLoader(dataset, batch_size=BATCH, sampler=sampler))
    ours = run(idist.auto_model(cnn(0)), idist.auto_dataloader(dataset, batch_size=BATCH, sampler=sampler))
    assert ours == plain
