"""A training step through idist, beside one with DistributedDataParallel by hand: `python bench/training.py`.

Two ranks train equal models in turns on the same batches; the parameters are compared at the end. A step by hand stands
beside another one by hand as well: by so much do equal programs differ. It depends on where things come to lie in
memory, so all is done in several jobs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from alternate import Comparison, alternate, arguments, report
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import idist

STEPS = {"MLP": 10, "ResNet-18-like": 1}
"""In a turn."""

JOBS = 8
BY_HAND, AGAIN = "DDP by hand", "DDP by hand, again"


def mlp() -> nn.Module:
    """A small one, where what is beside the arithmetic shows most."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


class Block(nn.Module):
    """Two convolutions with a shortcut: He et al., https://arxiv.org/abs/1512.03385."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape: ``(n, inputs, h, w)`` to ``(n, outputs, h / stride, w / stride)``."""
        result: Tensor = torch.relu(self.body(x) + self.shortcut(x))
        return result


def resnet() -> nn.Module:
    """Eight blocks as of ResNet-18, a quarter as wide."""
    widths = [16, 16, 32, 32, 64, 64, 128, 128]
    blocks = [Block(a, b, 1 if a == b else 2) for a, b in zip([16, *widths[:-1]], widths, strict=True)]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (mlp, (32, 64)),
    "ResNet-18-like": (resnet, (16, 3, 32, 32)),
}


def stepper(wrapped: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Callable[[int], None]:
    """A number of steps."""

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(wrapped(x), y).backward()
            optimizer.step()

    return run


def compare(name: str, turns: int, quick: bool, ours_first: bool) -> dict[str, list[float]]:
    """Seconds of a step of each."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    first = make()
    x, y = torch.randn(shape), torch.randint(10, shape[:1])
    models: dict[str, nn.Module] = {}
    runs = {}
    for who in ("idist", BY_HAND, AGAIN)[:: 1 if ours_first else -1]:
        models[who] = make()
        models[who].load_state_dict(first.state_dict())
        wrapped = (idist.auto_model if who == "idist" else DistributedDataParallel)(models[who])
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
        runs[who] = stepper(wrapped, idist.auto_optim(optimizer) if who == "idist" else optimizer, x, y)

    def timed(run: Callable[[int], None]) -> float:
        steps = 1 if quick else STEPS[name]
        idist.barrier()
        begun = time.perf_counter()
        run(steps)
        return (time.perf_counter() - begun) / steps

    for run in runs.values():
        run(2)
    times = alternate({who: lambda run=run: timed(run) for who, run in runs.items()}, turns)  # type: ignore[misc]
    ours, *theirs = (nn.utils.parameters_to_vector(model.parameters()) for model in models.values())
    assert all(torch.equal(ours, other) for other in theirs), "they have trained to different parameters"
    return times


def work(local_rank: int, turns: int, quick: bool, ours_first: bool) -> dict[str, dict[str, list[float]]]:
    """Compare all models."""
    torch.set_num_threads(1)
    return {name: compare(name, turns, quick, ours_first) for name in MODELS}


def main() -> None:
    """Measure all."""
    options = arguments(__doc__, turns=50)
    jobs = []
    for job in range(1 if options.quick else JOBS):
        with idist.Parallel(backend="gloo", nproc_per_node=2) as parallel:
            jobs.append(parallel.run(work, options.turns, options.quick, job % 2 == 0)[0])
    found = {
        (name, who): [seconds for job in jobs for seconds in job[name][who]]
        for name in MODELS
        for who in ("idist", BY_HAND, AGAIN)
    }
    report(
        (
            Comparison(f"training step, {name}, 2 ranks{what}", BY_HAND, found[name, who], found[name, BY_HAND], 1.01)
            for name in MODELS
            for who, what in (("idist", ""), (AGAIN, "; by hand, again"))
        ),
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
