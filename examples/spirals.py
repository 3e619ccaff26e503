"""Train a small network to tell two spirals apart; bare_torch/, bare_horovod/, bare_xla/ have it without idist."""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.utils.data import TensorDataset

import idist

EPOCHS = 60


def spirals(count: int) -> TensorDataset:
    mixed = torch.arange(count) * 101 % count
    turn = (0.5 + 2.5 * mixed / count) * torch.pi
    side = mixed % 2
    angle = turn + side * torch.pi
    return TensorDataset(torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1) / 10, side)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def training(local_rank: int, config: argparse.Namespace) -> None:
    torch.manual_seed(0)
    device = idist.device()
    loader = idist.auto_dataloader(spirals(config.nb_samples), batch_size=config.batch_size)
    model = idist.auto_model(network())
    optimizer = idist.auto_optim(torch.optim.Adam(model.parameters(), lr=0.01))
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
                mean = idist.all_reduce(loss.item(), "AVERAGE")
                idist.print_once(f"loss {mean:.4f} in step {step}")
    mean = idist.all_reduce(total, "AVERAGE")
    idist.print_once(f"loss {mean:.4f} after {EPOCHS} epochs in {idist.get_world_size()} processes")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small network to tell two spirals apart.")
    parser.add_argument("--backend", default="auto", help="how the processes talk; auto: what suits this machine")
    parser.add_argument("--nproc_per_node", type=int, help="processes to start here; left out, none")
    parser.add_argument("--log_interval", type=int, default=0, help="steps from one line to the next; 0: none")
    parser.add_argument("--nb_samples", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=64, help="of all processes together")
    return parser.parse_args()


if __name__ == "__main__":
    config = arguments()
    with idist.Parallel(backend=config.backend, nproc_per_node=config.nproc_per_node) as parallel:
        parallel.run(training, config)
