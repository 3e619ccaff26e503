"""What the collectives of one backend cost here: the part of ``idist bench`` that runs on every rank.

Bus bandwidth is what nccl-tests mean by it: the algorithm's, size over time, times a factor that makes the number of
ranks drop out, so that it can be held against the speed of the hardware.
Source: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from idist import collectives, runtime
from idist.runtime import Context

Call = Callable[[], object]

_TURN_S = 0.02
"""What one turn of a case takes, about."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What to measure.

    Attributes:
        collectives: some of :data:`COLLECTIVES`.
        sizes: in bytes.
        dtype: a name of torch's.
        op: the reduction of those that reduce.
        turns: measurements of each case, of idist and of the bare backend in turns.
    """

    collectives: tuple[str, ...]
    sizes: tuple[int, ...]
    dtype: str
    op: str
    turns: int


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        size: bytes of the larger of what a rank gives and what it gets.
        count: elements in them.
        redop: the reduction, or "none".
        time_us: of one call on the slowest rank, in microseconds; the median of the turns.
        algbw: size over time, in GB/s.
        busbw: in GB/s; see the module.
        wrong: elements that were not what they have to be, on all ranks together.
        bare_us: as ``time_us``, of the backend's own primitive; None where it has none for this type.
        ratio: the median of the turns' ratios of idist to the bare backend.
    """

    collective: str
    size: int
    count: int
    dtype: str
    redop: str
    time_us: float
    algbw: float
    busbw: float
    wrong: int
    bare_us: float | None
    ratio: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """All rows of one backend."""

    backend: str
    ranks: int
    nodes: int
    environment: str
    device: str
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One collective at one size.

    Attributes:
        call: what is timed: gives the backend the same memory in every call.
        bare: the same by the backend alone.
        result: the collective's result for the pattern; None on a rank that gets none.
        expected: what that has to be.
    """

    call: Call
    bare: Call | None
    result: Tensor | None
    expected: Tensor


class Bench:
    """The tensors of one size on this rank. Every rank's pattern is known to all, and small enough to be exact."""

    def __init__(self, context: Context, count: int, dtype: torch.dtype, op: str) -> None:
        self.context, self.op = context, op
        self.size, self.rank = context.world_size, context.rank
        self.device = context.backend.device()
        self.base = (torch.arange(count, device=self.device) % 7).to(dtype)
        self.mine = self.pattern(self.rank)
        self.part = self.of(self.rank, self.rank)
        self.reduces = context.backend.reduces(op, dtype)

    def all_reduce(self) -> Case:
        """Zeros for the time: they stay zeros, however often they are reduced in place."""
        zeros, everyone = torch.zeros_like(self.mine), self.context.everyone
        return Case(
            lambda: collectives.all_reduce_(zeros, self.op),
            (lambda: self.context.backend.all_reduce_(zeros, self.op, everyone).wait()) if self.reduces else None,
            collectives.all_reduce(self.mine, self.op),
            self.reduced(),
        )

    def reduce_scatter(self) -> Case:
        """Each rank gets its part of the whole."""
        out, everyone, backend = torch.empty_like(self.part), self.context.everyone, self.context.backend
        return Case(
            lambda: collectives.reduce_scatter(self.mine, self.op),
            (lambda: backend.reduce_scatter_into(out, self.mine, self.op, everyone).wait()) if self.reduces else None,
            collectives.reduce_scatter(self.mine, self.op),
            self.reduced().view(self.size, -1)[self.rank],
        )

    def all_gather(self) -> Case:
        """Each rank brings a part."""
        out, everyone = torch.empty_like(self.mine), self.context.everyone
        return Case(
            lambda: collectives.all_gather(self.part),
            lambda: self.context.backend.all_gather_into(out, self.part, everyone).wait(),
            collectives.all_gather(self.part),
            self.parts(),
        )

    def gather(self) -> Case:
        """To rank 0."""
        out = torch.empty_like(self.mine) if self.rank == 0 else None
        return Case(
            lambda: collectives.gather(self.part),
            lambda: self.context.backend.gather_into(out, self.part, 0, self.context.everyone).wait(),
            collectives.gather(self.part),
            self.parts(),
        )

    def broadcast(self) -> Case:
        """From rank 0."""
        copy = self.mine.clone()
        return Case(
            lambda: collectives.broadcast(self.mine),
            lambda: self.context.backend.broadcast_(copy, 0, self.context.everyone).wait(),
            collectives.broadcast(self.mine),
            self.pattern(0),
        )

    def scatter(self) -> Case:
        """From rank 0, which has a tensor for each."""
        values = list(self.mine.view(self.size, -1)) if self.rank == 0 else None
        out, everyone = torch.empty_like(self.part), self.context.everyone
        source = self.mine if self.rank == 0 else None
        return Case(
            lambda: collectives.scatter(values),
            lambda: self.context.backend.scatter_into(out, source, 0, everyone).wait(),
            collectives.scatter(values),
            self.of(0, self.rank),
        )

    def all_to_all(self) -> Case:
        """A part for each from each."""
        out, everyone = torch.empty_like(self.mine), self.context.everyone
        return Case(
            lambda: collectives.all_to_all(self.mine),
            lambda: self.context.backend.all_to_all_into(out, self.mine, everyone).wait(),
            collectives.all_to_all(self.mine),
            torch.cat([self.of(rank, self.rank) for rank in range(self.size)]),
        )

    def pattern(self, rank: int) -> Tensor:
        """What a rank brings."""
        return self.base + rank % 5

    def of(self, rank: int, part: int) -> Tensor:
        """One of the equal parts of what a rank brings."""
        return self.base.view(self.size, -1)[part] + rank % 5

    def reduced(self) -> Tensor:
        """Of all ranks' patterns."""
        added = [rank % 5 for rank in range(self.size)]
        if self.op == "SUM":
            return self.base * self.size + sum(added)
        return self.base + (min(added) if self.op == "MIN" else max(added))

    def parts(self) -> Tensor:
        """Of all ranks, one after the other."""
        return torch.cat([self.of(rank, rank) for rank in range(self.size)])


COLLECTIVES: dict[str, tuple[Callable[[Bench], Case], Callable[[int], float]]] = {
    "all_reduce": (Bench.all_reduce, lambda n: 2 * (n - 1) / n),
    "all_gather": (Bench.all_gather, lambda n: (n - 1) / n),
    "reduce_scatter": (Bench.reduce_scatter, lambda n: (n - 1) / n),
    "broadcast": (Bench.broadcast, lambda n: 1.0),
    "gather": (Bench.gather, lambda n: (n - 1) / n),
    "scatter": (Bench.scatter, lambda n: (n - 1) / n),
    "all_to_all": (Bench.all_to_all, lambda n: (n - 1) / n),
}
"""Each with its factor from algorithm to bus bandwidth."""

REDUCING = ("all_reduce", "reduce_scatter")
OPS = ("SUM", "MIN", "MAX")
DTYPES = ("float32", "float64", "int32", "int64")
"""In which the patterns and their sums are exact."""


def measure(local_rank: int, plan: Plan, show: Callable[[Result, Row], None] | None) -> Result:
    """All cases, in the current context; all ranks call it.

    Args:
        local_rank: as every function of a rank gets it.
        plan: the same on all ranks.
        show: called on rank 0 for each row when it is known, with the rows before it.
    """
    context = runtime.place()
    backend, device = context.backend.name, str(context.backend.device())
    result = Result(backend, context.world_size, context.topology.nnodes, context.topology.environment, device, ())
    for row in _rows(context, plan):
        if show is not None and context.rank == 0:
            show(result, row)
        result = dataclasses.replace(result, rows=(*result.rows, row))
    return result


def _rows(context: Context, plan: Plan) -> Iterator[Row]:
    dtype: torch.dtype = getattr(torch, plan.dtype)
    for name in plan.collectives:
        make, factor = COLLECTIVES[name]
        counts = dict.fromkeys(_count(size, dtype.itemsize, context.world_size) for size in plan.sizes)
        for count in counts:
            case = make(Bench(context, count, dtype, plan.op))
            wrong = 0 if case.result is None else int((case.result != case.expected).sum())
            ours, bare = _times(context, case, plan)
            typical, size = statistics.median(ours), count * dtype.itemsize
            yield Row(
                collective=name,
                size=size,
                count=count,
                dtype=plan.dtype,
                redop=plan.op if name in REDUCING else "none",
                time_us=typical * 1e6,
                algbw=size / typical / 1e9,
                busbw=size / typical / 1e9 * factor(context.world_size),
                wrong=collectives.all_reduce(wrong),
                bare_us=statistics.median(bare) * 1e6 if bare else None,
                ratio=statistics.median(a / b for a, b in zip(ours, bare, strict=True)) if bare else None,
            )


def _count(size: int, itemsize: int, ranks: int) -> int:
    """Elements: at least one for each rank, and as many for each."""
    return max(size // (itemsize * ranks), 1) * ranks


def _times(context: Context, case: Case, plan: Plan) -> tuple[list[float], list[float]]:
    """Seconds of a call of idist and of the bare backend, by turn; all ranks return the same."""
    calls = [call for call in (case.call, case.bare) if call is not None]
    # Two backends that differ in what they have, by rank, would not be one backend: the list is the same on all.
    once = max(_timed(call, 2) for call in calls)
    repeats = collectives.broadcast(max(1, int(_TURN_S / once)))
    turns = [[_timed(call, repeats) for call in calls] for _ in range(plan.turns)]
    ours, *bare = zip(*turns, strict=True)
    return list(ours), list(bare[0]) if bare else []


def _timed(call: Call, repeats: int) -> float:
    """Seconds of a call on the slowest rank."""
    collectives.barrier()
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize()
    return collectives.all_reduce((time.perf_counter() - begun) / repeats, "MAX")


def _synchronize() -> None:
    """Wait for an accelerator, which works while its calls have returned."""
    device = runtime.current().backend.device()
    module: Any = torch.get_device_module(device) if device.type != "cpu" else None
    if module is not None:
        module.synchronize(device)


def sizes(least: int, most: int, factor: int) -> Sequence[int]:
    """``least``, and ``factor`` times the last, up to ``most``."""
    found = [least]
    while found[-1] * factor <= most:
        found.append(found[-1] * factor)
    return found
