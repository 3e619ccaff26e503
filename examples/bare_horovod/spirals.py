"""The training of ../spirals.py on Horovod alone, in processes that horovodrun starts or that start here."""

from __future__ import annotations

import argparse

import horovod
import horovod.torch as hvd
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

EPOCHS = 60


def spirals(count: int) -> TensorDataset:
    mixed = torch.arange(count) * 101 % count
    turn = (0.5 + 2.5 * mixed / count) * torch.pi
    side = mixed % 2
    angle = turn + side * torch.pi
    return TensorDataset(torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1) / 10, side)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def average(value: float, name: str) -> float:
    return float(hvd.allreduce(torch.tensor(value, dtype=torch.float64), name=name))


def training(config: argparse.Namespace) -> None:
    hvd.init()
    torch.manual_seed(0)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", hvd.local_rank())
        torch.cuda.set_device(device)
    data = spirals(config.nb_samples)
    sampler: DistributedSampler[object] = DistributedSampler(data, hvd.size(), hvd.rank(), shuffle=False)
    loader = DataLoader(data, batch_size=config.batch_size // hvd.size(), sampler=sampler)
    model = network().to(device)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    step = 0
    for _ in range(EPOCHS):
        total = 0.0
        for points, sides in loader:
            loss = nn.functional.cross_entropy(model(points.to(device)), sides.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / len(loader)
            step += 1
            if config.log_interval and step % config.log_interval == 0:
                mean = average(loss.item(), "loss of a step")
                if hvd.rank() == 0:
                    print(f"loss {mean:.4f} in step {step}", flush=True)
    mean = average(total, "loss of an epoch")
    if hvd.rank() == 0:
        print(f"loss {mean:.4f} after {EPOCHS} epochs in {hvd.size()} processes", flush=True)
    hvd.shutdown()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small network to tell two spirals apart.")
    parser.add_argument("--backend", default="horovod", choices=["horovod"], help="there is no other here")
    parser.add_argument("--nproc_per_node", type=int, help="processes to start here; left out, none")
    parser.add_argument("--log_interval", type=int, default=0, help="steps from one line to the next; 0: none")
    parser.add_argument("--nb_samples", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=64, help="of all processes together")
    return parser.parse_args()


if __name__ == "__main__":
    config = arguments()
    if config.nproc_per_node is not None:
        horovod.run(training, (config,), np=config.nproc_per_node, use_gloo=True)
    else:
        training(config)
