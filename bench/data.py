"""What a shuffled order costs, beside torch's DistributedSampler and Accelerate's loader: `python bench/data.py`.

Rank 0 of 8 in each case, every measurement in a process of its own: the time from nothing to the first batch, the
time to draw the indices of a whole epoch (no data are loaded), and the memory that the process had at most above what
it had when it began. The times are those of one machine.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

RANKS, BATCH = 8, 64
PEERS = ("idist", "torch", "accelerate")
LABELS = {"idist": "idist.ShardSampler", "torch": "DistributedSampler", "accelerate": "Accelerate's loader"}
BYTES_PER_SAMPLE = {"idist": 0, "torch": 48, "accelerate": 48}
"""At the peak: 8 in torch.randperm's tensor, 40 for each integer in the list made of it."""
UNITS = {"first": "seconds to the first batch", "epoch": "seconds for the indices of an epoch", "memory": "peak MiB"}


class Indices(Dataset[int]):
    """A dataset without data."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


def loader_of(peer: str, dataset: Dataset[int]) -> Any:
    """This peer's loader of rank 0."""
    if peer == "accelerate":
        from accelerate import PartialState
        from accelerate.data_loader import prepare_data_loader

        PartialState(cpu=True)
        plain = DataLoader(dataset, batch_size=BATCH, shuffle=True)
        return prepare_data_loader(plain, num_processes=RANKS, process_index=0, put_on_device=False)
    if peer == "torch":
        from torch.utils.data import DistributedSampler as Kind
    else:
        from idist import ShardSampler as Kind
    return DataLoader(dataset, batch_size=BATCH, sampler=Kind(dataset, RANKS, 0, shuffle=True))


def memory() -> float:
    """The most that this process has had, in MiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def measure(peer: str, length: int) -> dict[str, float]:
    """One peer at one length, in this process."""
    loader_of(peer, Indices(BATCH * RANKS))  # what is imported late
    before, begun = memory(), time.perf_counter()
    loader = loader_of(peer, Indices(length))
    next(iter(loader))
    first, begun = time.perf_counter() - begun, time.perf_counter()
    batches = sum(1 for _ in loader.batch_sampler)
    assert batches == -(-length // RANKS // BATCH)
    return {"first": first, "epoch": time.perf_counter() - begun, "memory": memory() - before}


def available() -> int:
    """Bytes of memory that can be had without swapping."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024


def run(peer: str, length: int) -> dict[str, float] | str:
    """The figures, or why there are none."""
    needed = BYTES_PER_SAMPLE[peer] * length
    if needed > 0.9 * available():
        return f"not run: needs {needed / 2**30:.0f} GiB, {available() / 2**30:.0f} are free"
    command = [sys.executable, __file__, "--measure", peer, f"{length}"]
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return figures


def draw(results: dict[tuple[str, int], dict[str, float] | str], path: Path) -> None:
    """The figures as a picture."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"], rcParams["svg.fonttype"] = "idist", "none"
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, 3), UNITS.items(), strict=True):
        for peer, marker in zip(PEERS, "os^", strict=True):
            lengths = [n for p, n in results if p == peer and not isinstance(results[p, n], str)]
            values = [results[peer, n][name] for n in lengths]  # type: ignore[index]
            axes.plot(lengths, values, marker=marker, label=LABELS[peer])
        axes.set(title=title, xlabel="samples", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    if any(isinstance(result, str) for result in results.values()):
        figure.supxlabel("a line ends where the next case would not fit the memory", fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure all, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1e6, 1e8, 1e9], help="numbers of samples")
    parser.add_argument("--plot", type=Path, help="write the picture there, an svg or png")
    parser.add_argument("--measure", nargs=2, metavar=("PEER", "LENGTH"), help="one case, here; prints it as json")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]))))
        return
    print(f"| samples | | {' | '.join(UNITS.values())} |\n|--:|---|--:|--:|--:|", flush=True)
    results = {}
    for length in map(int, options.sizes):
        for peer in PEERS:
            result = results[peer, length] = run(peer, length)
            figures = (
                f"{result} | | "
                if isinstance(result, str)
                else (f"{result['first']:.4f} | {result['epoch']:.2f} | {result['memory']:.0f} ")
            )
            print(f"| {length:,} | {LABELS[peer]} | {figures}|", flush=True)
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
