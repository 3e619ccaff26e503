"""The training of ../spirals.py on torch_xla alone: it starts a rank for each device of this host, and no others."""

from __future__ import annotations

import argparse

import torch
import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from torch_xla.distributed.parallel_loader import MpDeviceLoader

EPOCHS = 60


def spirals(count: int) -> TensorDataset:
    mixed = torch.arange(count) * 101 % count
    turn = (0.5 + 2.5 * mixed / count) * torch.pi
    side = mixed % 2
    angle = turn + side * torch.pi
    return TensorDataset(torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1) / 10, side)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def average(value: float, device: torch.device) -> float:
    together = xm.all_reduce(xm.REDUCE_SUM, torch.tensor(value, dtype=torch.float64, device=device))
    torch_xla.sync()
    return float(together.item() / xr.world_size())


def training(rank: int, config: argparse.Namespace) -> None:
    torch.manual_seed(0)
    device = torch_xla.device()
    data = spirals(config.nb_samples)
    sampler: DistributedSampler[object] = DistributedSampler(data, xr.world_size(), rank, shuffle=False)
    loader = DataLoader(data, batch_size=config.batch_size // xr.world_size(), sampler=sampler)
    feed = MpDeviceLoader(loader, device)
    model = network().to(device)
    xm.broadcast_master_param(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    step = 0
    for _ in range(EPOCHS):
        total = 0.0
        for points, sides in feed:
            loss = nn.functional.cross_entropy(model(points), sides)
            optimizer.zero_grad()
            loss.backward()
            xm.optimizer_step(optimizer)
            torch_xla.sync()
            total += loss.item() / len(loader)
            step += 1
            if config.log_interval and step % config.log_interval == 0:
                mean = average(loss.item(), device)
                if rank == 0:
                    print(f"loss {mean:.4f} in step {step}", flush=True)
    mean = average(total, device)
    if rank == 0:
        print(f"loss {mean:.4f} after {EPOCHS} epochs in {xr.world_size()} processes", flush=True)


def worker(rank: int, config: argparse.Namespace) -> None:
    """One of the ranks that start here."""
    if config.nproc_per_node not in (None, xr.local_device_count()):
        raise SystemExit(f"torch_xla starts {xr.local_device_count()} here, not {config.nproc_per_node}")
    training(rank, config)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small network to tell two spirals apart.")
    parser.add_argument("--backend", default="xla", choices=["xla"])
    parser.add_argument("--nproc_per_node", type=int, help="as many as there are devices; left out, the same")
    parser.add_argument("--log_interval", type=int, default=0, help="steps from one line to the next; 0: none")
    parser.add_argument("--nb_samples", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=64, help="of all processes together")
    return parser.parse_args()


if __name__ == "__main__":
    torch_xla.launch(worker, args=(arguments(),))
