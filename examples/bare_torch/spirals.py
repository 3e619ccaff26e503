"""The training of ../spirals.py on torch alone, in processes that torchrun starts or that start here."""

from __future__ import annotations

import argparse
import os
import socket
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
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


def average(value: float, device: torch.device) -> float:
    together = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(together)
    return together.item() / dist.get_world_size()


def training(local_rank: int, config: argparse.Namespace) -> None:
    torch.manual_seed(0)
    device = torch.device("cpu")
    if config.backend == "nccl":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    data = spirals(config.nb_samples)
    sampler: DistributedSampler[object] = DistributedSampler(data, shuffle=False)
    loader = DataLoader(data, batch_size=config.batch_size // dist.get_world_size(), sampler=sampler)
    model = DistributedDataParallel(network().to(device))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
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
                mean = average(loss.item(), device)
                if dist.get_rank() == 0:
                    print(f"loss {mean:.4f} in step {step}", flush=True)
    mean = average(total, device)
    if dist.get_rank() == 0:
        print(f"loss {mean:.4f} after {EPOCHS} epochs in {dist.get_world_size()} processes", flush=True)
    time.sleep(0.1)  # or torch aborts one exit in ten: gloo's threads still need Python's lock


def worker(local_rank: int, port: int, config: argparse.Namespace) -> None:
    """One of the processes that start here."""
    size, address = config.nproc_per_node or 1, f"tcp://127.0.0.1:{port}"
    dist.init_process_group(config.backend, init_method=address, rank=local_rank, world_size=size)
    training(local_rank, config)
    dist.destroy_process_group()


def free_port() -> int:
    """One that is free now, and that with luck is so still when it is used."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small network to tell two spirals apart.")
    parser.add_argument("--backend", default="nccl" if torch.cuda.is_available() else "gloo")
    parser.add_argument("--nproc_per_node", type=int, help="processes to start here; left out, none")
    parser.add_argument("--log_interval", type=int, default=0, help="steps from one line to the next; 0: none")
    parser.add_argument("--nb_samples", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=64, help="of all processes together")
    return parser.parse_args()


if __name__ == "__main__":
    config = arguments()
    if config.nproc_per_node is not None:
        mp.spawn(worker, (free_port(), config), nprocs=config.nproc_per_node)
    elif "LOCAL_RANK" in os.environ:  # torchrun says the rest as well
        dist.init_process_group(config.backend)
        training(int(os.environ["LOCAL_RANK"]), config)
        dist.destroy_process_group()
    else:
        worker(0, free_port(), config)
