"""Warnings of a scheduler, for the processes that we have started: they may save and leave, and then so do we."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from idist.errors import WorkerFailed

_WARNINGS = (signal.SIGUSR1, signal.SIGTERM)


class Relay:
    """Where warnings go.

    Attributes:
        to: takes a signal, once there is anybody to take it.
        passed_on: those that came.
    """

    def __init__(self) -> None:
        self.to: Callable[[signal.Signals], None] | None = None
        self.passed_on: list[signal.Signals] = []


@contextmanager
def passing_on_warnings() -> Iterator[Relay]:
    """Pass SIGUSR1 and SIGTERM on, instead of ending of them.

    Workers that listen, with :func:`idist.should_stop`, return in time. The others end of the signal,
    and this process after them, as it would have done. A handler of the user stays in its place.
    """
    relay = Relay()
    ours = [number for number in _WARNINGS if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():  # Python hears signals only there
        ours = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if relay.to is None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        else:
            relay.passed_on.append(signal.Signals(number))
            relay.to(signal.Signals(number))

    for number in ours:
        signal.signal(number, pass_on)
    ended_of_it = False
    try:
        yield relay
    except WorkerFailed as error:
        ended_of_it = any(error.exitcode == -number for number in relay.passed_on)
        raise
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
        if ended_of_it:
            os.kill(os.getpid(), relay.passed_on[0])
