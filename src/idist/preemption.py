"""Leave in time: a scheduler's warning on any rank, heard by all of them together."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any

from idist import collectives
from idist.errors import ConfigError
from idist.runtime import at_end

__all__ = ["should_stop"]

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


_ONE_WARNING_S = 2.0


class _Ear:
    """Remembers that a signal came. One that comes again later does what it would have done without us.

    At once it is the same warning: a scheduler tells the process and the one that started it, which
    passes it on.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._heard_at: dict[int, float] = {}

    @property
    def heard(self) -> bool:
        return bool(self._heard_at)

    @property
    def listening(self) -> bool:
        return bool(self._before)

    def listen(self) -> None:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._hear)

    def rest(self) -> None:
        """Put back the handlers that were there."""
        for number in list(self._before):
            self._put_back(number)
        self._heard_at.clear()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        first = self._heard_at.setdefault(number, time.monotonic())
        if time.monotonic() - first > _ONE_WARNING_S:
            self._put_back(number)
            os.kill(os.getpid(), number)
        elif callable(self._before[number]):
            self._before[number](number, frame)

    def _put_back(self, number: int) -> None:
        before = self._before.pop(number)
        signal.signal(number, signal.SIG_DFL if before is None else before)


_ear = _Ear()


def end_is_near() -> Connection:
    """What :func:`let_one_pass` takes; to be called in the process that has the helpers, which it tells of its end."""
    global _tells_of_the_end_of
    if _tells_of_the_end_of is None or _tells_of_the_end_of[0] != os.getpid():
        reader, writer = multiprocessing.Pipe(duplex=False)
        # Called, at the end of every process of Python, just before daemons like the workers of a loader are told to
        # end, by one signal, and are waited for, for ever. https://docs.python.org/3/library/multiprocessing.html
        Finalize(None, writer.send_bytes, (b"end",), exitpriority=0)
        _tells_of_the_end_of = os.getpid(), reader
    return _tells_of_the_end_of[1]


_tells_of_the_end_of: tuple[int, Connection] | None = None


@contextmanager
def held_back(start_method: str) -> Iterator[None]:
    """A helper that is started meanwhile hears of a signal when :func:`let_one_pass` has made it ready.

    Not by a fork server, which may be started meanwhile itself: whatever it forks later would hear of none.
    """
    if start_method == "forkserver":
        yield
        return
    if start_method == "spawn":
        resource_tracker.ensure_running()  # it lets SIGTERM through when it is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def let_one_pass(end_is_near: Connection) -> None:
    """In a helper of a process that trains, a worker of its loader: a first signal ends the other alone, if any.

    Schedulers and torchrun tell all processes of a job, and a loader whose worker has been ended raises in the middle
    of whatever the training process does, of saving for one. A second signal ends the worker, and so does the first
    if the other is at its end.
    """
    passed: set[int] = set()

    def pass_over(number: int, frame: FrameType | None) -> None:
        if end_is_near.poll():
            os._exit(0)  # of a worker that ends of a signal torch says so, with a traceback
        if number in passed:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        passed.add(number)

    for number in _SIGNALS:
        signal.signal(number, pass_over)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def should_stop() -> bool:
    """Whether any rank has been told to end: then all of them save and leave, in the same step.

    Slurm warns before the time limit (``sbatch --signal=USR1@120``) and when it requeues or cancels a
    job (SIGTERM); Kubernetes and spot instances send SIGTERM. The first call, in the main thread of
    every rank, begins to listen to SIGUSR1 and SIGTERM: before it they end the process as always, and
    one that comes again, two seconds after the first or later, does too. A process that has started the
    ranks itself passes both on to them. :func:`idist.finalize` puts the handlers back.

    ::

        for step, batch in enumerate(loader):
            ...
            if step % 10 == 0 and idist.should_stop():
                save()
                break

    Returns:
        The same on every rank.

    Raises:
        ConfigError: the first call is not in the main thread, where alone Python lets one listen.

    Cost: one all_gather of 256 bytes.
    """
    if not _ear.listening and not _ear.heard:
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError("call idist.should_stop() in the main thread first: Python hears signals only there")
        _ear.listen()
        at_end.append(_ear.rest)
    return collectives.all_reduce(_ear.heard, "OR")
