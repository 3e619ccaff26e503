"""should_stop: a signal on one rank is heard by all, in the same step."""

from __future__ import annotations

import os
import signal
import threading

import pytest

import idist
from idist.testing import run_processes


def stops_together(signals: dict[int, signal.Signals]) -> list[bool]:
    """What should_stop says in four steps, when ranks get their signals before the third."""
    said = []
    for step in range(4):
        if step == 2 and idist.get_rank() in signals:
            os.kill(os.getpid(), signals[idist.get_rank()])
        said.append(idist.should_stop())
    return said


@pytest.mark.parametrize(
    "signals", [{}, {1: signal.SIGUSR1}, {0: signal.SIGTERM}, {0: signal.SIGUSR1, 1: signal.SIGTERM}]
)
def test_all_ranks_stop_in_the_same_step(signals: dict[int, signal.Signals]) -> None:
    expected = [False, False, bool(signals), bool(signals)]
    assert run_processes(stops_together, 2, signals, backend="gloo") == [expected, expected]


def test_finalize_puts_the_handlers_back() -> None:
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        ours = signal.getsignal(signal.SIGUSR1)
        assert not idist.should_stop()
        assert signal.getsignal(signal.SIGUSR1) is not ours
        os.kill(os.getpid(), signal.SIGUSR1)
        assert idist.should_stop()
        assert heard == [signal.SIGUSR1], "the handler of the user hears it too"
        idist.finalize()
        assert signal.getsignal(signal.SIGUSR1) is ours
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert not idist.should_stop(), "a new context begins anew"
        idist.finalize()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_first_call_belongs_in_the_main_thread() -> None:
    errors: list[BaseException] = []

    def call() -> None:
        try:
            idist.should_stop()
        except idist.ConfigError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])
