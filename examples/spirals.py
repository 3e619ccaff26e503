"""Train a small network to tell two spirals apart; bare_horovod/spirals.py is the same on Horovod alone."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import idist


def spirals(count: int = 512) -> TensorDataset:
    mixed = torch.arange(count) * 101 % count
    turn = (0.5 + 2.5 * mixed / count) * torch.pi
    side = mixed % 2
    angle = turn + side * torch.pi
    return TensorDataset(torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1) / 10, side)


def training(local_rank: int, epochs: int) -> None:
    torch.manual_seed(0)
    loader = idist.auto_dataloader(spirals(), batch_size=64, shuffle=False)
    model = idist.auto_model(nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)))
    optimizer = idist.auto_optim(torch.optim.Adam(model.parameters(), lr=0.01))
    for _ in range(epochs):
        total = 0.0
        for points, sides in loader:
            loss = nn.functional.cross_entropy(model(points.to(idist.device())), sides.to(idist.device()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / len(loader)
    average = idist.all_reduce(total, "AVERAGE")
    if idist.get_rank() == 0:
        print(f"loss {average:.4f} after {epochs} epochs in {idist.get_world_size()} processes", flush=True)


def arguments() -> tuple[int, dict[str, Any]]:
    parser = argparse.ArgumentParser(description="Train a small network to tell two spirals apart.")
    parser.add_argument("--backend", default="auto", help="how the processes talk; auto: what suits this machine")
    parser.add_argument("--nproc_per_node", type=int, help="processes to start here; left out, none")
    parser.add_argument("--epochs", type=int, default=60)
    given = vars(parser.parse_args())
    return given.pop("epochs"), given


if __name__ == "__main__":
    epochs, placing = arguments()
    with idist.Parallel(**placing) as parallel:
        parallel.run(training, epochs)
