"""Collectives on tensors, numbers, strings and objects, beside torch and pytorch-ignite: `python bench/collectives.py`.

Two ranks over gloo, every library in the same process group.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from alternate import Comparison, alternate, arguments, report

import idist

Call = Callable[[], object]
CALLS = 10
"""In a turn."""

RECORD = {"loss": 0.5, "name": "abc", "epoch": 3}


def all_gather_object(value: object) -> list[object]:
    """As torch's manual does it."""
    out: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def broadcast_object(value: object, src: int) -> object:
    """As torch's manual does it."""
    out = [value]
    dist.broadcast_object_list(out, src)
    return out[0]


def on_a_copy(tensor: torch.Tensor) -> Call:
    """With torch what idist's all_reduce does, which leaves its input as it is."""
    return lambda: dist.all_reduce(tensor.clone())


def to_and_fro(broadcast: Callable[..., object], value: object) -> Call:
    """From either rank in turn: a source that is free to go on before the others have it is not waited for else."""
    sources = itertools.cycle([0, 1])
    return lambda: broadcast(value, src=next(sources))


def questions() -> dict[str, tuple[Call, dict[str, tuple[Call, float]]]]:
    """What is done: by idist, and by each of the others, with the target of the ratio."""
    import ignite.distributed as ignite

    scalar, vector = torch.tensor(0.0), torch.zeros(1024)
    group = dist.new_group([0, 1])
    in_group = partial(dist.all_reduce, scalar, group=group)
    answers: dict[str, tuple[Call, dict[str, tuple[Call, float]]]] = {
        "all_reduce(3), exact and checked": (
            partial(idist.all_reduce, 3),
            {"torch, a 0-d tensor": (partial(dist.all_reduce, scalar), 1.15)},
        ),
        "all_reduce_ of a 0-d tensor, group=[0, 1]": (
            partial(idist.all_reduce_, scalar, group=[0, 1]),
            {"torch, the group made once": (in_group, 1.05)},
        ),
        "all_reduce of a 0-d tensor, group=[0, 1]": (
            partial(idist.all_reduce, scalar, group=[0, 1]),
            {"torch, in place, the group made once": (in_group, 1.05)},
        ),
    }
    for name, tensor in {"a 0-d tensor": scalar, "4 KB": vector}.items():
        in_place, on_copy = partial(dist.all_reduce, tensor), on_a_copy(tensor)
        answers[f"all_reduce_ of {name}"] = partial(idist.all_reduce_, tensor), {"torch": (in_place, 1.05)}
        answers[f"all_reduce of {name}"] = (
            partial(idist.all_reduce, tensor),
            {"torch, on a copy": (on_copy, 1.05), "torch, in place": (in_place, 1.05)},
        )
    for name, value in {'"abc"': "abc", "a dict": RECORD}.items():
        theirs: dict[str, Any] = {"torch": partial(all_gather_object, value)}
        if isinstance(value, str):
            theirs["pytorch-ignite"] = partial(ignite.all_gather, value)
        answers[f"all_gather of {name}"] = (
            partial(idist.all_gather, value),
            {key: (call, 0.5) for key, call in theirs.items()},
        )
        theirs = {"torch": to_and_fro(broadcast_object, value)}
        if isinstance(value, str):
            theirs["pytorch-ignite"] = to_and_fro(ignite.broadcast, value)
        answers[f"broadcast of {name}"] = (
            to_and_fro(idist.broadcast, value),
            {key: (call, 0.5) for key, call in theirs.items()},
        )
    return answers


def seconds(call: Call, calls: int) -> float:
    """What one call takes."""
    dist.barrier()
    begun = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begun) / calls


def work(local_rank: int, turns: int, quick: bool) -> list[Comparison]:
    """Ask all."""
    calls = 2 if quick else CALLS
    found = []
    for what, (ours, others) in questions().items():
        cases = {"idist": ours, **{beside: call for beside, (call, _) in others.items()}}
        for call in cases.values():
            seconds(call, calls)
        times = alternate({name: partial(seconds, call, calls) for name, call in cases.items()}, turns)
        found += [Comparison(what, beside, times["idist"], times[beside], others[beside][1]) for beside in others]
    if not quick:  # this one makes a process group in every call, and keeps it: few and last
        import ignite.distributed as ignite

        scalar, few = torch.tensor(0.0), 5
        cases = {
            "idist": partial(seconds, partial(idist.all_reduce, scalar, group=[0, 1]), few),
            "pytorch-ignite": partial(seconds, partial(ignite.all_reduce, scalar, group=[0, 1]), few),
        }
        times = alternate(cases, 5)
        what = "all_reduce of a 0-d tensor, group=[0, 1]"
        found.append(Comparison(what, "pytorch-ignite", times["idist"], times["pytorch-ignite"], 0.25))
    return found


def main() -> None:
    """Measure all."""
    options = arguments(__doc__, turns=2000)
    with idist.Parallel(backend="gloo", nproc_per_node=2) as parallel:
        found = parallel.run(work, options.turns, options.quick)[0]
    report(found, as_json=options.json)


if __name__ == "__main__":
    main()
