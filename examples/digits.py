"""Train a small CNN on handwritten digits.

One unchanged file, whoever starts it and however many processes run it:

    python examples/digits.py                         # one process
    python examples/digits.py --nproc_per_node 2      # two processes, started here
    torchrun --nproc_per_node 2 examples/digits.py    # two processes, started by torchrun
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import idist


def datasets(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """The 1,797 digits that scikit-learn ships, 8 x 8 pixels each; a fifth of every class is held out."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader[tuple[Tensor, ...]]) -> tuple[int, int]:
    """How many of how many images are recognised: every image counts once, whichever rank has seen it."""
    model.eval()
    correct = total = 0
    for images, labels in loader:
        predictions = model(images.to(idist.device())).argmax(dim=1).cpu()
        correct += int((predictions == labels).sum())
        total += len(labels)
    return idist.all_reduce(correct), idist.all_reduce(total)


def training(local_rank: int, config: argparse.Namespace) -> float:
    """What every process runs. Returns the accuracy on the held-out digits."""
    torch.manual_seed(config.seed)
    train_set, test_set = datasets(config.seed)
    train_loader = idist.auto_dataloader(train_set, batch_size=config.batch_size, shuffle=True, drop_last=True)
    test_loader = idist.auto_dataloader(test_set, batch_size=256, shuffle=False)
    model = idist.auto_model(cnn())
    optimizer = idist.auto_optim(torch.optim.AdamW(model.parameters(), lr=config.lr))
    steps = config.epochs * len(train_loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=config.lr, total_steps=steps)

    losses: list[float] = []
    accuracies: list[float] = []
    table = Table("epoch", "training loss", "test images", "accuracy")
    progress = Progress()
    bar = progress.add_task("training", total=steps)
    with Live(Group(table, progress), console=Console(quiet=idist.get_rank() != 0)):
        for epoch in range(config.epochs):
            model.train()
            loss_sum = 0.0
            for images, labels in train_loader:
                loss = cross_entropy(model(images.to(idist.device())), labels.to(idist.device()))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                loss_sum += loss.item()
                progress.advance(bar)
            losses.append(idist.all_reduce(loss_sum / len(train_loader), "AVERAGE"))
            correct, total = evaluate(model, test_loader)
            accuracies.append(correct / total)
            table.add_row(f"{epoch + 1}", f"{losses[-1]:.4f}", f"{correct} of {total}", f"{correct / total:.2%}")
    draw(losses, accuracies, config.output)
    return accuracies[-1]


@idist.one_rank_only()
def draw(losses: list[float], accuracies: list[float], path: Path) -> None:
    """The curves of the run, as a picture."""
    epochs = range(1, len(losses) + 1)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(epochs, losses, color="tab:red")
    left.set(title="training loss", xlabel="epoch", yscale="log")
    right.plot(epochs, accuracies, color="tab:blue")
    right.set(title=f"test accuracy: {accuracies[-1]:.2%}", xlabel="epoch")
    right.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    print(f"\nThe curves are in {path}.")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small CNN on handwritten digits.")
    parser.add_argument("--backend", default="auto", help="how the processes talk; auto: what suits this machine")
    parser.add_argument("--nproc_per_node", type=int, help="processes to start here; left out, none")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch_size", type=int, default=32, help="of all processes together")
    parser.add_argument("--lr", type=float, default=5e-3, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("digits.png"), help="the picture of the curves")
    parser.add_argument("--min_accuracy", type=float, default=0.0, help="fail below this test accuracy")
    return parser.parse_args()


if __name__ == "__main__":
    config = arguments()
    with idist.Parallel(backend=config.backend, nproc_per_node=config.nproc_per_node) as parallel:
        accuracy, *_ = parallel.run(training, config)
    if accuracy < config.min_accuracy:
        sys.exit(f"test accuracy {accuracy:.2%} is below the required {config.min_accuracy:.2%}")
