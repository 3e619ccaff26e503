"""What initialize costs processes that run already, beside pytorch-ignite: `python bench/initialize.py`.

Every rank is a process with torch and both libraries imported, as torchrun's are when they come to initialize. Counts
the collectives as well, at the seam of torch's process group.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from multiprocessing.synchronize import Barrier
from typing import Any

from alternate import Comparison, alternate, arguments, report
from start import free_port

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier", "all_gather_into_tensor")


def variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """As torchrun sets them."""
    return {
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def counting(counts: Counter[str]) -> None:
    """Have torch's collectives counted, wherever their names are looked up."""
    import torch.distributed as dist

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return wrapper

    for name in COLLECTIVES:
        setattr(dist, name, counted(name, getattr(dist, name)))


def rank_of(peer: str, rank: int, ranks: int, port: int, together: Barrier, results: Any) -> None:
    """One rank: rank 0 tells how long it took until all had done it, and how many collectives there were."""
    os.environ.update(variables(rank, ranks, port))
    if peer == "idist":
        import idist as library
    else:
        import ignite.distributed as library
    counts: Counter[str] = Counter()
    counting(counts)
    together.wait()
    begun = time.monotonic()
    library.initialize("gloo")
    library.get_local_rank()
    together.wait()
    if rank == 0:
        results.put((time.monotonic() - begun, sum(counts.values())))
    library.finalize()


def seconds(peer: str, ranks: int, collectives: dict[str, int]) -> float:
    """One job."""
    context = multiprocessing.get_context("fork")
    together, results, port = context.Barrier(ranks), context.SimpleQueue(), free_port()
    processes = [
        context.Process(target=rank_of, args=(peer, rank, ranks, port, together, results)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    if any(process.exitcode for process in processes):
        raise SystemExit(f"{peer}: a rank failed")
    taken, collectives[peer] = results.get()
    return float(taken)


def main() -> None:
    """Measure all."""
    options = arguments(__doc__, turns=7)
    ranks = 2 if options.quick else 16
    import ignite.distributed  # noqa: F401 - once, for the processes that are forked

    import idist  # noqa: F401

    collectives: dict[str, int] = {}
    peers = ("idist", "pytorch-ignite")
    times = alternate({peer: lambda peer=peer: seconds(peer, ranks, collectives) for peer in peers}, options.turns)
    what = f"initialize, {ranks} ranks; {collectives['idist']} collectives beside {collectives['pytorch-ignite']}"
    report([Comparison(what, "pytorch-ignite", times["idist"], times["pytorch-ignite"], 1.0)], as_json=options.json)
    if collectives["idist"] > 1:
        sys.exit("idist makes more than one exchange")


if __name__ == "__main__":
    main()
