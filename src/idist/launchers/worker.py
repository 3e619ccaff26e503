"""What runs in a process that we have started: settle in, join the others, call the function, report.

A worker says how it went over a pipe before it ends. After a failure it waits to be ended: as long
as its connections stay open, the ranks that wait for it do not fail in turn, and the first failure
stays the first.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import multiprocessing
import os
import pickle
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

import torch

from idist import backends, runtime
from idist.failures import may_be_consequence
from idist.launchers.payload import Expected, Payload, Streams
from idist.topology import Topology

NAME = "idist rank "
"""How the names of our processes begin."""

UNGUARDED = 77
"""Exit code of a worker that came back to where workers are started while it imported the main module."""

BEGUN = b"\x01"
"""What a worker says first: the main module is imported."""

LENGTH = struct.Struct("!Q")
"""What comes before the pickled outcome."""

_FLUSH_S = 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Returned:
    """What the function returned, pickled."""

    value: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Raised:
    """How the function, or the start before it, failed.

    Attributes:
        at: when, in seconds of the clock that all processes of a host share.
        consequence: whether it looks like what happens to a rank when another one is gone.
        details: the traceback.
        exitcode: what ``sys.exit`` was called with, if it was.
    """

    at: float
    consequence: bool
    details: str
    exitcode: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Assignment:
    """What a worker is to be.

    Attributes:
        backend: by its name, for a worker that is a rank; or what runs the function on ranks that it starts itself.
        environment: of this process; ``None``: that which it has.
        variables: what is added to it.
        threads: with how many it computes.
        start_method: that :mod:`multiprocessing` has by default in the process that started us.
        streams: its standard output and error, where it has not inherited them.
        forked: whether it is a copy of the process that started us.
    """

    backend: str | Callable[..., Any]
    topology: Topology
    environment: Mapping[str, str] | None
    variables: Mapping[str, str]
    threads: int
    start_method: str | None
    streams: Streams | None
    forked: bool


class Lifeline:
    """A pipe that its owner holds open as long as the workers are to live, and writes nothing into.

    Args:
        reader: the end of the workers.
        writer: the owner's end, where this process has inherited it.
    """

    def __init__(self, reader: Connection, writer: Connection | None) -> None:
        self._reader = reader
        self._writer = writer

    def watch(self) -> None:
        """End this process when the owner lets go, or is gone, even if the main thread is stuck."""
        if self._writer is not None:
            self._writer.close()
        threading.Thread(target=self._end_with_it, name="idist lifeline", daemon=True).start()

    def _end_with_it(self) -> None:
        self._reader.poll(None)
        for child in multiprocessing.active_children():  # such as those of a DataLoader
            child.kill()
        # The main thread may be stuck while it holds a stream, so somebody else flushes, for a moment.
        flushing = threading.Thread(target=flush, daemon=True)
        flushing.start()
        flushing.join(_FLUSH_S)
        os._exit(1)


def inside() -> bool:
    """Whether this process is a worker of ours."""
    return multiprocessing.current_process().name.startswith(NAME)


def refuse_unguarded_main() -> None:
    """End this process if it is a worker that still imports the main module; ours says what to do about it.

    :mod:`multiprocessing` names a process first, then imports the main module, and only then
    tells it its parent.
    """
    if inside() and multiprocessing.parent_process() is None:
        flush()
        os._exit(UNGUARDED)


def main(
    orders: Connection, report: Connection, lifeline: Lifeline, assignment: Assignment, payload: Payload | Expected
) -> None:
    """Run a worker from start to end.

    Args:
        orders: through which the payload comes, if it has not come yet.
        report: through which the outcome goes.
    """
    lifeline.watch()
    signal.signal(signal.SIGINT, _interrupt_once)
    if assignment.forked:
        atexit._clear()  # what is registered there belongs to the process that we are a copy of
    outcome: Returned | Raised
    try:
        _send(report, BEGUN)
        _settle_in(assignment)
        outcome = Returned(_work(assignment, *payload.open(orders)))
    except BaseException as error:
        outcome = raised(error)
    flush()
    message = pickle.dumps(outcome)
    with contextlib.suppress(BrokenPipeError):
        _send(report, LENGTH.pack(len(message)), message)
    if isinstance(outcome, Raised):
        threading.Event().wait()  # the lifeline ends us
    # A process of multiprocessing leaves out what its user has registered, unless it was spawned; then this is all.
    atexit._run_exitfuncs()


def _settle_in(assignment: Assignment) -> None:
    """Make this process what a fresh one would be: the fork server may have been started long ago."""
    if assignment.streams is not None:
        assignment.streams.adopt()
    if assignment.environment is not None:
        for name in set(os.environ) - set(assignment.environment):
            del os.environ[name]
        os.environ.update(assignment.environment)
    os.environ.update(assignment.variables)
    # A DataLoader in a worker starts its processes as it would in a process of any other launcher.
    multiprocessing.set_start_method(assignment.start_method, force=True)
    torch.set_num_threads(assignment.threads)
    drawn = sys.modules.get("numpy.random")
    if drawn is not None and not assignment.forked:  # a copy of the fork server's, so the same on all ranks
        drawn.seed()


def _work(
    assignment: Assignment,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: dict[str, Any],
) -> bytes:
    if callable(assignment.backend):
        return returned(assignment.backend, fn, args, kwargs, options)
    runtime.start(backends.create(assignment.backend), assignment.topology, **options)
    result = returned(fn, assignment.topology.local_rank, *args, **kwargs)
    runtime.finalize()
    return result


def returned(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> bytes:
    """What the function returns, pickled; None, if it ends the program and says that all is well.

    Raises:
        TypeError: it cannot be sent.
    """
    try:
        value = fn(*args, **kwargs)
    except SystemExit as exit_:
        if exit_.code not in (None, 0):
            raise
        value = None  # it said that all is well
    try:
        return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # whatever a __reduce__ of the user raises
        raise TypeError(
            f"what the function returned, a {type(value).__name__}, cannot be sent to the process that started it: "
            f"{error}. Return plain values, tensors, or None."
        ) from error


def raised(error: BaseException) -> Raised:
    """How it is told."""
    at = time.monotonic()
    runtime.explain(error)
    exitcode = None
    if isinstance(error, SystemExit):
        exitcode = error.code if isinstance(error.code, int) else 1
    return Raised(at, may_be_consequence(error), _traceback_of(error), exitcode)


def _traceback_of(error: BaseException) -> str:
    try:
        frames = error.__traceback__
        while frames is not None and frames.tb_next is not None and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        return "".join(traceback.format_exception(type(error), error, frames)).rstrip()
    except Exception:  # no memory is left, or the exception cannot even be shown
        return f"{type(error).__module__}.{type(error).__qualname__} (its traceback could not be made)"


def _interrupt_once(signum: int, frame: FrameType | None) -> None:
    """Ctrl-C comes from the terminal and from the process that started us: once is enough."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _send(report: Connection, *parts: bytes) -> None:
    # In slices, so that a large outcome is not copied; the reader tells where it ends by its length.
    for part in parts:
        view = memoryview(part)
        while view:
            view = view[os.write(report.fileno(), view[: 1 << 20]) :]


def flush() -> None:
    """Write out what was printed, now."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or nobody reads it
            stream.flush()
