"""Leave in time: a scheduler's warning on any rank, heard by all of them together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from idist import collectives
from idist.errors import ConfigError
from idist.runtime import current

__all__ = ["should_stop"]

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class _Ear:
    """Remembers that a signal came. The second one of a kind does what it would have done without us."""

    def __init__(self) -> None:
        self.heard = False
        self._before: dict[int, Any] = {}

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
        self.heard = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard = True
        before: Callable[[int, FrameType | None], Any] | int | None = self._put_back(number)
        if callable(before):
            before(number, frame)

    def _put_back(self, number: int) -> Any:
        before = self._before.pop(number)
        signal.signal(number, signal.SIG_DFL if before is None else before)
        return before


_ear = _Ear()


def should_stop() -> bool:
    """Whether any rank has been told to end: then all of them save and leave, in the same step.

    Slurm warns before the time limit (``sbatch --signal=USR1@120``) and when it requeues or cancels a
    job (SIGTERM); Kubernetes and spot instances send SIGTERM. The first call, in the main thread of
    every rank, begins to listen to SIGUSR1 and SIGTERM: before it they end the process as always, and
    after one was heard a second of its kind does. :func:`idist.finalize` puts the handlers back.

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
    context = current()
    if not _ear.listening and not _ear.heard:
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError("call idist.should_stop() in the main thread first: Python hears signals only there")
        _ear.listen()
        context.at_end.append(_ear.rest)
    return collectives.all_reduce(_ear.heard, "OR")
