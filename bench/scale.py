"""What a rank of a job far larger than this machine has to do: `python bench/scale.py`.

Measured: the work of one rank, with torch's fake process group, which answers at once whatever the number of ranks; so
it is the work beside the network. Counted: the collectives and the bytes that a rank gives to them, and the operations
on the store in a meeting of real clients, one thread each. See docs/performance.md for what follows from it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
import timeit
from collections import Counter
from collections.abc import Callable
from typing import Any

RANKS = (2, 64, 1024, 16384)
CLIENTS = (8, 32, 128)
SAMPLES = 10**8


class Counted:
    """A backend's primitives, whose calls and bytes are counted; they answer as if all ranks had said the same."""

    def __init__(self, backend: Any) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self._all_gather, self._all_reduce = backend.all_gather_into, backend.all_reduce_
        backend.all_gather_into, backend.all_reduce_ = self.all_gather_into, self.all_reduce_

    def all_gather_into(self, out: Any, tensor: Any, group: Any) -> Any:
        """Every rank brings what this one brings."""
        self.calls["all_gather"] += 1
        self.bytes["all_gather"] += out.nbytes
        work = self._all_gather(out, tensor, group)
        out.view(group.size, -1).copy_(tensor)
        return work

    def all_reduce_(self, tensor: Any, op: str, group: Any) -> Any:
        """The largest of equal numbers; sums are not multiplied."""
        self.calls["all_reduce"] += 1
        self.bytes["all_reduce"] += tensor.nbytes
        return self._all_reduce(tensor, op, group)

    def told(self, call: Callable[[], object]) -> str:
        """What one call costs, in words."""
        self.calls.clear()
        self.bytes.clear()
        call()
        return " + ".join(f"{n} {name}, {self.bytes[name]:,} B" for name, n in self.calls.items()) or "none"


def work_of_a_rank(ranks: int) -> dict[str, tuple[float, str]]:
    """Seconds of this rank's work, and the collectives; in a process of its own."""
    import torch
    import torch.distributed as dist
    import torch.testing._internal.distributed.fake_pg  # registers the backend

    import idist
    from idist import runtime

    rank = ranks // 2
    dist.init_process_group("fake", store=dist.HashStore(), rank=rank, world_size=ranks)
    begun = time.perf_counter()
    context = runtime.current()
    found = {"adopt the process group": (time.perf_counter() - begun, "none")}
    counted = Counted(context.backend)
    scalar, half = torch.tensor(1.0), range(rank % 2, ranks, 2)
    calls: dict[str, Callable[[], object]] = {
        "get_rank()": idist.get_rank,
        "torch's own all_reduce of a 0-d tensor": lambda: dist.all_reduce(scalar),
        "all_reduce of a 0-d tensor": lambda: idist.all_reduce(scalar),
        "all_reduce(3)": lambda: idist.all_reduce(3),
        "all_reduce(0.5, 'MAX')": lambda: idist.all_reduce(0.5, "MAX"),
        "broadcast('abc')": lambda: idist.broadcast("abc"),
        "all_gather('abc')": lambda: idist.all_gather("abc"),
        "all_reduce of a 0-d tensor, group=half of the ranks": lambda: idist.all_reduce(scalar, group=half),
        "a sampler of 1e8 samples, first index": lambda: next(iter(idist.ShardSampler(range(SAMPLES), ranks, rank))),
    }
    for name, call in calls.items():
        told = counted.told(call)
        number = max(1, int(0.05 / max(timeit.timeit(call, number=1), 1e-7)))
        found[name] = (min(timeit.repeat(call, number=number, repeat=5)) / number, told)
    return found


def counting_store() -> tuple[type, Counter[tuple[int, str]]]:
    """Torch's PrefixStore, which counts what each thread asks of it; polls, which take what time takes, apart."""
    import torch.distributed as dist

    counts: Counter[tuple[int, str]] = Counter()
    original = dist.PrefixStore
    names = ("add", "set", "get", "check", "compare_set", "multi_get", "multi_set")

    def counted(name: str) -> Callable[..., Any]:
        def method(self: Any, *args: Any) -> Any:
            polls = name == "check" or (name == "add" and args[1] == 0)
            counts[threading.get_ident(), "polls" if polls else "operations"] += 1
            return getattr(original, name)(self, *args)

        return method

    return type("Counting", (original,), {name: counted(name) for name in names}), counts


def meet(clients: int) -> dict[str, float]:
    """All ranks of a job meet at one store, which do not know their nodes; what rank 0 and another one ask of it."""
    import torch.distributed as dist

    from idist import rendezvous
    from idist.topology import Topology

    counting, counts = counting_store()
    server = rendezvous.serve("127.0.0.1", 0, "bench", clients)
    address: dict[str, Any] = {"master_addr": "127.0.0.1", "master_port": server.port, "store_served": True}
    ranks_of: dict[int, int] = {}
    usual, dist.PrefixStore = dist.PrefixStore, counting  # type: ignore[misc, assignment]

    def rank_of(rank: int) -> None:
        ranks_of[threading.get_ident()] = rank
        rendezvous.join(Topology("bench", rank, clients, job_token="bench", **address), "bench")

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(clients)]
    begun = time.perf_counter()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        dist.PrefixStore = usual  # type: ignore[misc]
    taken = time.perf_counter() - begun
    asked: dict[str, dict[int, int]] = {"operations": {}, "polls": {}}
    for (ident, kind), n in counts.items():
        asked[kind][ranks_of[ident]] = n
    operations = asked["operations"]
    return {
        "operations": max(n for rank, n in operations.items() if rank != 0),
        "operations of rank 0": operations[0],
        "polls": max(asked["polls"].values()),
        "seconds": taken,
    }


def heading(*names: str) -> None:
    """The head of a table."""
    print(f"\n| {' | '.join(names)} |\n|{'--:|' * len(names)}", flush=True)


def main() -> None:
    """Measure and count all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest sizes, to see that it works")
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ranks:
        print(json.dumps(work_of_a_rank(options.ranks)))
        return
    heading("ranks", "what a rank does", "its work, µs", "collectives, and bytes that it gets")
    for ranks in RANKS[:2] if options.quick else RANKS:
        command = [sys.executable, __file__, "--ranks", str(ranks)]
        ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        for what, (seconds, told) in json.loads(ended.stdout.splitlines()[-1]).items():
            print(f"| {ranks:,} | {what} | {seconds * 1e6:,.1f} | {told} |", flush=True)
    heading("clients", "store operations of a rank", "of rank 0", "polls of a rank, at most", "seconds")
    for clients in CLIENTS[:1] if options.quick else CLIENTS:
        met = meet(clients)
        figures = (met["operations"], met["operations of rank 0"], met["polls"], f"{met['seconds']:.3f}")
        print(f"| {clients} | {' | '.join(map(str, figures))} |", flush=True)


if __name__ == "__main__":
    main()
