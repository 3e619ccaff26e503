"""A training run in which rank 1 fails, in one way and at one moment; every launcher starts it.

Arguments: launcher, kind of failure and moment as in cells.py; a folder, the backend, the timeout in seconds.
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import idist
from idist import environments, runtime

LAUNCHER, KIND, MOMENT, FOLDER, BACKEND, TIMEOUT = sys.argv[1:]
FAILING = 1
STEPS = 6


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("has a lock")
        self.lock = threading.Lock()

    def __reduce__(self) -> str:
        raise TypeError("not me")


class Broken:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        raise KeyError("no such item")


class Telling:
    """Comes to its moment when it is pickled, which a collective does."""

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def __reduce__(self) -> tuple[type, tuple[str]]:
        comes_to(self.moment)
        return Telling, (self.moment,)


def fails() -> None:
    if KIND == "raise":
        raise ValueError("boom of rank 1")
    if KIND == "raise while others wait":
        raise ValueError("boom of rank 1")
    if KIND == "raise in a DataLoader worker":
        next(iter(DataLoader(Broken(), num_workers=1)))
    if KIND == "raise what cannot be pickled":
        raise Unpicklable
    if KIND == "out of memory":
        taken = []  # as long as the traceback is kept
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)
        while True:
            taken.append(bytearray(1 << 20))
    if KIND == "sys.exit(3)":
        sys.exit(3)
    if KIND == "os._exit(4)":
        os._exit(4)
    if KIND == "segmentation fault":
        ctypes.string_at(0)
    if KIND.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[KIND])
    time.sleep(100)  # until it is stopped, or Ctrl-C is pressed


def comes_to(moment: str) -> None:
    """Rank 1 fails here, if this is the moment, and tells when."""
    if moment != MOMENT or rank() != FAILING:
        return
    if KIND == "raise while others wait":
        time.sleep(1)
    event = Path(FOLDER, "coming")
    event.write_text(str(time.time()))
    event.rename(Path(FOLDER, "event"))
    fails()


def rank() -> int:
    """Also before anything has begun."""
    started, _, index = multiprocessing.current_process().name.rpartition("idist rank ")
    if index.isdecimal() and not started:
        return int(index)
    return environments.detect(os.environ).topology.rank


def training(local_rank: int) -> None:
    runtime.at_end.append(functools.partial(comes_to, "during finalize"))
    model = idist.auto_model(torch.nn.Linear(4, 4))
    if BACKEND == "horovod":  # it wants one, whose import takes seconds
        idist.auto_optim(torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(STEPS):
        last = step == STEPS - 1
        if last:
            comes_to("between steps")
        idist.all_gather(Telling("inside a collective" if last else "not yet"))
        loss = model(torch.ones(2, 4)).sum()
        if last:
            loss.register_hook(lambda gradient: comes_to("inside backward"))
        loss.backward()


if LAUNCHER != "spawn" or __name__ != "__main__":
    comes_to("before init")

if __name__ == "__main__":
    nproc = 2 if LAUNCHER == "spawn" else None
    with idist.Parallel(BACKEND, nproc_per_node=nproc, timeout=float(TIMEOUT)) as parallel:
        parallel.run(training)
