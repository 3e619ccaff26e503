"""Start ranks with torch_xla.launch: it alone knows which processes and threads drive the devices of this host.

It does not watch them: a rank that waits for one that has failed would wait for ever. So a rank that fails ends its
process, torch_xla.launch then ends the others, and each leaves its outcome in a folder. All that happens in a process
of its own, which the same crew watches as in :mod:`idist.launchers.spawn`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from idist import runtime
from idist.errors import ConfigError, WorkerFailed
from idist.launchers import worker
from idist.launchers.crew import SETTLE_S, Crew
from idist.launchers.job import Job
from idist.launchers.payload import Payload, is_only_here
from idist.launchers.relay import passing_on_warnings
from idist.launchers.worker import Assignment, Raised, Returned
from idist.topology import SERIAL

logger = logging.getLogger("idist")

_LOOK_S = 0.05
_LEAVING_S = 5.0
_watching = threading.Lock()


@dataclasses.dataclass(frozen=True, slots=True)
class Offered:
    """There are another number of devices here than processes were asked for."""

    devices: int
    kind: str


Outcome = Returned | Raised | Offered


def launch(
    job: Job, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], env: Mapping[str, str]
) -> list[Any]:
    """See :func:`idist.launchers.launch`; ``job.nproc_per_node`` has to be the number of devices of this host."""
    if is_only_here(fn):
        raise ConfigError(
            f"the function {getattr(fn, '__qualname__', fn)} was typed where no other process can import it, and "
            f"{job.backend.launcher} starts new processes. Put it into a module, a .py file, and import it from there."
        )
    logger.info("%s runs on %d devices", getattr(fn, "__qualname__", fn), job.nproc_per_node)
    host = Assignment(
        backend=functools.partial(_run_on_devices, job.nproc_per_node),
        topology=SERIAL,
        environment=env,
        variables={},
        threads=1,
        start_method=multiprocessing.get_start_method(allow_none=True),
        streams=None,
        forked=False,
    )
    context = multiprocessing.get_context("spawn")
    with passing_on_warnings() as relay, Crew(context, daemon=False, patience=job.timeout) as crew:
        crew.start(0, host, Payload(fn, args, kwargs, job.options))
        relay.to = crew.signal
        (outcomes,) = crew.results()
    return _values(job, outcomes)


def _values(job: Job, outcomes: Sequence[Outcome | None]) -> list[Any]:
    """What the ranks returned; the first failure, if there was any."""
    failed = [(rank, outcome) for rank, outcome in enumerate(outcomes) if isinstance(outcome, Raised)]
    if failed:
        rank, first = min(failed, key=lambda found: (found[1].consequence, found[1].at))
        raise WorkerFailed(rank, first.exitcode, first.details)
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, Offered):
            raise ConfigError(
                f"nproc_per_node={job.nproc_per_node}, but the runtime of XLA has {outcome.devices} "
                f"{outcome.kind} device{'s' if outcome.devices > 1 else ''} on this host, each of which is a rank: "
                f"pass nproc_per_node={outcome.devices}, or let it see more or fewer with {outcome.kind}_NUM_DEVICES "
                "or TPU_VISIBLE_CHIPS"
            )
        if outcome is None:
            raise WorkerFailed(rank, None, "Its process ended without a report; what it printed above may tell why.")
    return [pickle.loads(outcome.value) for outcome in outcomes if isinstance(outcome, Returned)]  # noqa: S301 - ours


def _run_on_devices(
    nproc: int, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]
) -> list[Outcome | None]:
    """The outcomes by local rank; ``None`` of a rank that has left none."""
    import torch_xla

    with tempfile.TemporaryDirectory(prefix="idist-") as folder:
        what = pickle.dumps((fn, args, kwargs, options.get("verify")))
        launching = threading.Thread(target=_launch, args=(torch_xla, (folder, nproc, what)), daemon=True)
        launching.start()
        outcomes: list[Outcome | None] = [None]
        while launching.is_alive() and None in outcomes:
            launching.join(_LOOK_S)
            outcomes = [_read(Path(folder, str(rank))) for rank in range(nproc)]
        launching.join(_LEAVING_S)  # the runtime may hang when its process ends, and nothing depends on that any more
        for process in multiprocessing.active_children():
            process.kill()
        return [_read(Path(folder, str(rank))) for rank in range(nproc)]


def _launch(torch_xla: Any, args: tuple[Any, ...]) -> None:
    with contextlib.suppress(BrokenProcessPool):  # a rank has ended its process, and left word why
        torch_xla.launch(_run_rank, args=args)


def _run_rank(_: int, folder: str, nproc: int, what: bytes) -> None:
    """One rank: a process of its own, or a thread beside those of the other devices of this process."""
    from torch_xla import runtime as xla

    if _watching.acquire(blocking=False):  # once for the process
        threading.Thread(target=_end_with_parent, name="idist lifeline", daemon=True).start()
    rank = xla.local_ordinal()
    outcome: Outcome
    try:
        offered = xla.local_device_count()
        if offered == nproc:
            outcome = Returned(worker.returned(_call, rank, what))
        else:
            outcome = Offered(offered, xla.device_type())
    except BaseException as error:
        outcome = worker.raised(error)
    worker.flush()
    if rank < nproc:
        file = Path(folder, str(rank))
        file.with_suffix(".new").write_bytes(pickle.dumps(outcome))
        file.with_suffix(".new").rename(file)  # whole, or not there
    if isinstance(outcome, Raised):
        time.sleep(SETTLE_S)  # an earlier failure of another rank may be about to be told
        os._exit(1)


def _call(rank: int, what: bytes) -> Any:
    fn, args, kwargs, verify = pickle.loads(what)  # noqa: S301 - from the process that started this one
    context = runtime.current()
    if verify is not None:
        context.verify = verify
    return fn(rank, *args, **kwargs)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _read(file: Path) -> Outcome | None:
    try:
        outcome: Outcome = pickle.loads(file.read_bytes())  # noqa: S301 - from a process that we started
    except FileNotFoundError:
        return None
    return outcome
