"""The ranks of ``idist check`` meet and reduce something whose result is known."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from datetime import timedelta

import torch

from idist import backends, collectives, runtime
from idist.topology import Topology

_ELEMENTS = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Seat:
    """How the trial went for one rank.

    Attributes:
        software: versions that all ranks should share.
        right: whether the result was what it has to be.
        milliseconds: of one all-reduce, after a first one.
        problems: what this rank has found before.
    """

    rank: int
    host: str
    pid: int
    device: str
    software: str
    right: bool
    milliseconds: float
    problems: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """What the ranks told each other; ``seconds`` is how long it took until all had met."""

    backend: str
    seconds: float
    seats: list[Seat]


def run(backend: str, topology: Topology, *, timeout: timedelta, software: str, problems: tuple[str, ...]) -> Trial:
    """All ranks call it.

    Raises:
        IdistError: the ranks did not meet.
        RuntimeError: what the backend says of a connection that failed, or of a time that passed.
    """
    begin = time.monotonic()
    runtime.start(backends.create(backend), topology, timeout=timeout)
    seconds = time.monotonic() - begin
    try:
        context = runtime.current()
        device = context.backend.device()
        right, milliseconds = _all_reduce(context.rank, context.world_size, device)
        seat = Seat(
            rank=context.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=str(device),
            software=software,
            right=right,
            milliseconds=milliseconds,
            problems=problems,
        )
        return Trial(context.backend.name, seconds, collectives.all_gather(seat))
    finally:
        runtime.finalize()


def _all_reduce(rank: int, world_size: int, device: torch.device) -> tuple[bool, float]:
    """Each rank brings its rank + 1: a rank that is missing, or there twice, shows in the sum."""
    mine = torch.full((_ELEMENTS,), rank + 1, dtype=torch.int32, device=device)
    collectives.all_reduce(mine)  # the first one connects the ranks
    begin = time.perf_counter()
    values = set(collectives.all_reduce(mine).tolist())
    return values == {world_size * (world_size + 1) // 2}, (time.perf_counter() - begin) * 1000
