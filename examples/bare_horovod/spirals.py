"""The training of ../spirals.py on Horovod alone: horovodrun has to start it, and Horovod is all it can talk by."""

from __future__ import annotations

import argparse

import horovod.torch as hvd
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


def spirals(count: int = 512) -> TensorDataset:
    mixed = torch.arange(count) * 101 % count
    turn = (0.5 + 2.5 * mixed / count) * torch.pi
    side = mixed % 2
    angle = turn + side * torch.pi
    return TensorDataset(torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1) / 10, side)


def training(epochs: int) -> None:
    torch.manual_seed(0)
    device = torch.device("cuda", hvd.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    data = spirals()
    sampler: DistributedSampler[object] = DistributedSampler(
        data, num_replicas=hvd.size(), rank=hvd.rank(), shuffle=False
    )
    loader = DataLoader(data, batch_size=64 // hvd.size(), sampler=sampler)
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)).to(device)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    for _ in range(epochs):
        total = 0.0
        for points, sides in loader:
            loss = nn.functional.cross_entropy(model(points.to(device)), sides.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / len(loader)
    average = hvd.allreduce(torch.tensor(total, dtype=torch.float64), name="loss").item()
    if hvd.rank() == 0:
        print(f"loss {average:.4f} after {epochs} epochs in {hvd.size()} processes", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=60)
    epochs = parser.parse_args().epochs
    hvd.init()
    training(epochs)
    hvd.shutdown()
