"""Train a residual network on CIFAR-10: a whole run, with all that one needs.

    python examples/cifar10/main.py                                   # one process, a small generated set
    python examples/cifar10/main.py --data cifar-10-batches-bin --nproc_per_node 2 --amp
    torchrun --nproc_per_node 8 examples/cifar10/main.py --data cifar-10-batches-bin --amp --strategy fsdp

However it ends, the same command goes on from the newest checkpoint in --output, on as many ranks or on others.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from data import CLASSES, cifar10, generated
from resnet import resnet
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.tensorboard import SummaryWriter

import idist


def normalized(images: Tensor) -> Tensor:
    """From bytes to numbers around 0, by the mean and the deviation of CIFAR-10's colors."""
    mean = torch.tensor([0.4914, 0.4822, 0.4465], device=images.device).view(3, 1, 1)
    deviation = torch.tensor([0.2470, 0.2435, 0.2616], device=images.device).view(3, 1, 1)
    return (images / 255 - mean) / deviation


def augmented(images: Tensor, shift: int = 4) -> Tensor:
    """Each image moved by up to ``shift`` pixels, and every other one mirrored, at random.

    On the device, a batch at once: the random numbers are of this process, whose states are in a checkpoint.
    """
    count, _, rows, columns = images.shape
    mirrored = torch.rand(count, 1, 1, 1, device=images.device) < 0.5
    padded = pad(torch.where(mirrored, images.flip(3), images), [shift] * 4)
    down, right = torch.randint(2 * shift + 1, (2, count, 1), device=images.device)
    image = torch.arange(count, device=images.device).view(-1, 1, 1)
    row = (down + torch.arange(rows, device=images.device)).unsqueeze(2)
    column = (right + torch.arange(columns, device=images.device)).unsqueeze(1)
    return padded[image, :, row, column].permute(0, 3, 1, 2).contiguous()


def warm_up_and_decay(optimizer: torch.optim.Optimizer, warm_up: int, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate goes up to its own value in ``warm_up`` steps, and down to 0 in the rest."""

    def factor(step: int) -> float:
        return min((step + 1) / (warm_up + 1), (steps - step) / max(steps - warm_up, 1))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def average_statistics(model: nn.Module) -> None:
    """Of batch norm, which each rank takes of its own images: a checkpoint has one set, and so has an evaluation."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            idist.all_reduce_(buffer, "AVERAGE")


@torch.no_grad()
def evaluate(model: nn.Module, loader: Any) -> float:
    """The part of all images that is recognised: each counts once, whichever rank has seen it."""
    model.eval()
    right = seen = 0
    for images, labels in loader:
        predicted = model(normalized(images.to(idist.device()))).argmax(dim=1)
        right += int((predicted == labels.to(idist.device())).sum())
        seen += len(labels)
    model.train()
    return idist.reduce_mean(right, seen)


class Log:
    """Lines on the screen, and curves for TensorBoard in a folder; of rank 0.

    Args:
        step: where this run begins: what an earlier one drew after it, and did not save, is wiped out.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._curves = SummaryWriter(str(folder), purge_step=step + 1) if idist.get_rank() == 0 else None

    def __call__(self, step: int, **values: float) -> None:
        """What has come out of this step."""
        if self._curves is None:
            return
        print(f"step {step}:", ", ".join(f"{name} {value:.4g}" for name, value in values.items()), flush=True)
        for name, value in values.items():
            self._curves.add_scalar(name, value, step)
        self._curves.flush()


def loaders(config: argparse.Namespace) -> tuple[Any, Any]:
    """To train and to test with."""
    train_set, test_set = cifar10(config.data) if config.data else (generated(512, seed=1), generated(128, seed=2))
    how: dict[str, Any] = {"batch_size": config.batch_size, "num_workers": config.num_workers}
    train_loader = idist.auto_dataloader(train_set, shuffle=True, drop_last=True, seed=config.seed, **how)
    return train_loader, idist.auto_dataloader(test_set, **how)


def training(local_rank: int, config: argparse.Namespace) -> None:
    """What every rank runs."""
    device = idist.device()
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    idist.seed_all(config.seed)
    train_loader, test_loader = loaders(config)
    steps = len(train_loader)
    model = idist.auto_model(resnet(config.depth, CLASSES), strategy=config.strategy)
    bare = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9, weight_decay=5e-4)
    optimizer = idist.auto_optim(bare)
    schedule = warm_up_and_decay(optimizer, config.warm_up * steps, config.epochs * steps)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp and half is torch.float16)
    idist.seed_all(config.seed, per_rank=True)  # of the augmentation

    folder = config.output / "checkpoints"
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "loader": train_loader}
    parts |= {"schedule": schedule, "scaler": scaler}
    state = idist.load(folder, **parts, missing_ok=True)
    step, begun = state.get("step", 0), state.get("epoch", 0)
    log = Log(config.output, step)
    for epoch in range(begun, config.epochs):
        for images, labels in train_loader:
            with torch.autocast(device.type, half, enabled=config.amp):
                loss = cross_entropy(model(augmented(normalized(images.to(device)))), labels.to(device))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
            step += 1
            if step % config.log_interval == 0:
                log(step, loss=idist.all_reduce(loss.item(), "AVERAGE"), lr=optimizer.param_groups[0]["lr"])
            leaving = idist.should_stop()
            if leaving or step % config.save_every == 0:
                average_statistics(model)
                idist.save(folder, **parts, step=step, epoch=epoch, keep=2)
            if leaving:
                return
        average_statistics(model)
        log(step, accuracy=evaluate(model, test_loader))
        idist.save(folder, **parts, step=step, epoch=epoch + 1, keep=2)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a residual network on CIFAR-10.")
    parser.add_argument(
        "--data", type=Path, help="the directory of the binary version; left out, a small generated set"
    )
    parser.add_argument("--output", type=Path, default=Path("cifar10-run"), help="for checkpoints and TensorBoard")
    parser.add_argument("--backend", default="auto", help="how the processes talk; auto: what suits this machine")
    parser.add_argument("--nproc_per_node", type=int, help="processes to start here; left out, none")
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "fsdp"])
    parser.add_argument("--amp", action="store_true", help="mixed precision: float16 on CUDA, else bfloat16")
    parser.add_argument("--depth", type=int, default=20, help="layers of the network: 8, 14, 20, 32, 44, 56, ...")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--warm_up", type=int, default=1, help="epochs until the learning rate is --lr")
    parser.add_argument("--batch_size", type=int, default=128, help="of all processes together")
    parser.add_argument("--lr", type=float, default=0.1, help="the highest learning rate")
    parser.add_argument("--num_workers", type=int, default=0, help="to load data, of all processes of a node together")
    parser.add_argument("--save_every", type=int, default=200, help="steps from one checkpoint to the next")
    parser.add_argument("--log_interval", type=int, default=20, help="steps from one line to the next")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    config = arguments()
    with idist.Parallel(backend=config.backend, nproc_per_node=config.nproc_per_node) as parallel:
        parallel.run(training, config)
