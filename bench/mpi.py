"""all_reduce over mpi beside gloo, in one run: `mpiexec -n 2 python bench/mpi.py`.

Both backends reduce the same tensor in turns; a figure is the median of a turn's mean. Prints ratios: the times
are those of one machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

import idist

SIZES = {"4 KB": 1 << 10, "64 KB": 1 << 14, "1 MB": 1 << 18, "64 MB": 1 << 24}
"""Numbers of float32."""

SECONDS_PER_TURN = 0.2


def seconds(call: Callable[[], object], repeats: int) -> float:
    """What one call takes on the slowest rank, over ``repeats`` in a row."""
    idist.barrier()
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    return idist.all_reduce((time.perf_counter() - begun) / repeats, "MAX")


def compare(elements: int, gloo: dist.ProcessGroup, turns: int) -> dict[str, list[float]]:
    """The times of ``turns`` turns of each backend."""
    tensor = torch.ones(elements)
    calls = {"mpi": lambda: dist.all_reduce(tensor), "gloo": lambda: dist.all_reduce(tensor, group=gloo)}
    once = {name: seconds(call, 3) for name, call in calls.items()}
    repeats = {name: max(1, int(SECONDS_PER_TURN / once[name])) for name in calls}
    repeats = {name: idist.broadcast(count) for name, count in repeats.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            tensor.fill_(1)
            times[name].append(seconds(call, repeats[name]))
    return times


@idist.one_rank_only()
def show(label: str, times: dict[str, list[float]]) -> None:
    """Print a line of the table."""
    mpi, gloo = (statistics.median(times[name]) for name in ("mpi", "gloo"))
    ratios = sorted(ours / theirs for ours, theirs in zip(times["mpi"], times["gloo"], strict=True))
    spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
    print(f"{label:>6} {mpi * 1e6:12.1f} {gloo * 1e6:12.1f} {mpi / gloo:8.3f}   {spread}", flush=True)


def training(local_rank: int, turns: int) -> None:
    """Compare all sizes."""
    gloo = dist.new_group(backend="gloo")
    if idist.get_rank() == 0:
        print(f"all_reduce of float32, {idist.get_world_size()} ranks, {turns} turns, microseconds")
        print(f"{'':>6} {'mpi':>12} {'gloo':>12} {'ratio':>8}   over the turns", flush=True)
    for label, elements in SIZES.items():
        show(label, compare(elements, gloo, turns))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=9, help="turns of each backend")
    with idist.Parallel(backend="mpi") as parallel:
        parallel.run(training, parser.parse_args().turns)
