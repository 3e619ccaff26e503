"""What a getter costs in a process that is a rank, beside pytorch-ignite: `python bench/getters.py`."""

from __future__ import annotations

import timeit

import ignite.distributed as ignite
from alternate import Comparison, alternate, arguments, report

import idist

CALLS = 20_000
NAMES = ("get_rank", "get_world_size", "get_local_rank", "get_nproc_per_node", "get_nnodes", "get_node_rank")
TARGET_S = 100e-9


def main() -> None:
    """Measure all."""
    options = arguments(__doc__, turns=50)
    calls = 10 if options.quick else CALLS
    idist.initialize("gloo", rank=0, world_size=1)
    ignite.set_local_rank(0)
    ignite.sync()
    found = []
    for name in NAMES:
        cases = {"idist": getattr(idist, name), "pytorch-ignite": getattr(ignite, name)}
        timed = {
            library: lambda getter=getter: min(timeit.repeat(getter, number=calls, repeat=3)) / calls
            for library, getter in cases.items()
        }
        times = alternate(timed, options.turns)
        found.append(Comparison(f"{name}()", "pytorch-ignite", times["idist"], times["pytorch-ignite"], 1.0))
        found.append(Comparison(f"{name}()", "100 ns", times["idist"], [TARGET_S] * options.turns, 1.0))
    idist.finalize()
    report(found, as_json=options.json)


if __name__ == "__main__":
    main()
