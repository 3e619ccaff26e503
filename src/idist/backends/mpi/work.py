"""Operations under way: nonblocking calls of MPI, with a deadline."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from mpi4py import MPI

from idist.backends.base import Pending
from idist.backends.mpi.library import Departures

_SPINS = 200
_EAGER_S = 0.5
_LOOK_S = 0.25
_CONFIRM_S = 1.5
_IDLE_S = 0.0005
_yield = getattr(os, "sched_yield", lambda: time.sleep(0))
_MANY = 64
_under_way: set[MpiWork] = set()
"""What has not ended, whether or not anybody waits for it: MPI reads from its tensors and writes into them."""


class Watch:
    """How long an operation of a group may take, and of whom it is known that they will not come.

    Attributes:
        name: of the group.
        ranks: its global ranks.
        seconds: from the start of the operation.
        begun: how many operations this rank has begun.
    """

    def __init__(self, name: str, ranks: Iterable[int], timeout: timedelta, departures: Departures) -> None:
        self.name = name
        self.ranks = tuple(ranks)
        self.seconds = timeout.total_seconds()
        self.begun = 0
        self._departures = departures

    def problem(self, what: str, begun: float) -> str | None:
        """What speaks against waiting any longer."""
        now = time.monotonic()
        noticed = self._departures.noticed()
        gone = sorted(rank for rank in self.ranks if now - noticed.get(rank, now) > _CONFIRM_S)
        if gone:
            return f"{what} cannot end: {_ranks(gone)} ended without taking part. What they printed says why."
        if now - begun > self.seconds:
            return (
                f"{what} timed out after {self.seconds:.0f} s: some of the {len(self.ranks)} ranks of the group "
                "did not come, or called another collective."
            )
        return None


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


class MpiWork(dist.Work):
    """One operation, of one or more calls.

    Args:
        what: the operation, for messages.
        calls: nonblocking ones of MPI that give a request, each made when those before it have ended.
        tensors: what the operation gives.
        finish: called once when it has ended, before anybody sees the tensors.
        keep: what MPI reads from and writes into.
        statuses: one for each request, where somebody will ask whose message was received.
    """

    def __init__(
        self,
        watch: Watch,
        what: str,
        calls: Sequence[Callable[[], Any]],
        tensors: Any,
        *,
        finish: Callable[[], Any] | None = None,
        keep: Any = None,
        statuses: Sequence[Any] | None = None,
    ) -> None:
        super().__init__()
        self._watch = watch
        self._what = what
        self._calls = deque(calls)
        self._requests = [self._calls.popleft()()] if self._calls else []
        self._tensors = tensors
        self._finish = finish
        self._keep = keep
        self._statuses = statuses
        self._begun = time.monotonic()
        watch.begun += 1
        self._number = watch.begun
        self._done = False
        self._error: Exception | None = None
        self._ended: Any = None
        self._future: Any = None
        self._lock = threading.Lock()
        _under_way.add(self)
        if len(_under_way) > _MANY:
            for work in list(_under_way):
                work.advance()

    def start_all(self) -> None:
        """Make all calls now: the next operation of the group must not come before one of them."""
        with self._lock:
            while self._calls and self._error is None:
                self._requests.append(self._calls.popleft()())

    def advance(self) -> bool:
        """Let MPI work, and tell whether the operation has ended, well or not."""
        if self._done:
            return True
        with self._lock:
            if not self._done:
                try:
                    if not self._has_ended():
                        return False
                    if self._finish is not None:
                        self._finish()
                except Exception as error:  # MPI's own, or of a reduction
                    self._error = RuntimeError(f"{self._what} failed: {error}")
                self._done = True
                _under_way.discard(self)
        return True

    def _has_ended(self) -> bool:
        while MPI.Request.Testall(self._requests, self._statuses):
            if not self._calls:
                return True
            self._requests = [self._calls.popleft()()]
        return False

    def pending(self) -> Pending | None:
        """Unless it has ended."""
        watch = self._watch
        return None if self._done else Pending(self._what, self._number, watch.name, watch.ranks)

    def look(self) -> bool:
        """As :meth:`advance`, and give up if there is reason to."""
        if self.advance():
            return True
        problem = self._watch.problem(self._what, self._begun)
        if problem is not None:
            with self._lock:
                if not self._done:  # MPI may still write into its tensors, so it stays among those under way
                    self._error, self._done = RuntimeError(problem), True
        return self._done

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait until the operation has ended.

        Raises:
            RuntimeError: it failed, took longer than ``timeout`` or the group's, or can never end.
        """
        for _ in range(_SPINS):
            if self.advance():
                break
        else:
            self._wait_long(timeout.total_seconds())
        if self._error is not None:
            raise self._error
        return True

    def _wait_long(self, seconds: float) -> None:
        begun = looked = time.monotonic()
        while not self.advance():
            now = time.monotonic()
            if now - looked > _LOOK_S or now - self._begun > self._watch.seconds:
                looked = now
                if self.look():
                    return
                if 0 < seconds < now - begun:
                    raise RuntimeError(f"{self._what} has not ended after {seconds:.0f} s")
            if now - begun < _EAGER_S:
                _yield()
            else:
                time.sleep(_IDLE_S)

    def synchronize(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self.advance()

    def is_success(self) -> bool:
        return self.advance() and self._error is None

    def exception(self) -> Any:
        return self._error

    def result(self) -> Any:
        self.wait()
        return self._tensors

    def source_rank(self) -> int:
        """The rank within the group whose message was received."""
        self.wait()
        assert self._statuses is not None, f"{self._what} receives from no rank of its choice"
        return int(self._statuses[0].Get_source())

    _source_rank = source_rank

    def get_future(self) -> Any:
        """A future of the tensors; a thread sees to it that the operation ends without anybody waiting."""
        with self._lock:
            if self._future is not None:
                return self._future
            self._ended = torch.futures.Future()
            # Whoever waits for it in C++, as DDP does, takes what Future.set_exception leaves for the tensors, and
            # crashes. An error of a callback is an error there too.
            self._future = self._ended.then(lambda ended: self.result())
        _progress.add(self)
        return self._future

    def settle(self) -> None:
        """Tell the future that the operation has ended."""
        self._ended.set_result(None)


def pending() -> list[Pending]:
    """What has not ended, the oldest first."""
    works = sorted(_under_way.copy(), key=lambda work: work._begun)
    return [found for work in works if (found := work.pending()) is not None]


class Together(MpiWork):
    """Several operations as one, which ends when all have."""

    def __init__(self, watch: Watch, what: str, works: Sequence[MpiWork], tensors: Any) -> None:
        self._works = works
        super().__init__(watch, what, [], tensors)

    def start_all(self) -> None:
        for work in self._works:
            work.start_all()

    def _has_ended(self) -> bool:
        for work in self._works:
            if not work.advance():
                return False
            work.wait()  # raises, if it failed
        return True


class Progress:
    """The thread that moves operations on whose futures somebody waits for."""

    def __init__(self) -> None:
        self._works: list[MpiWork] = []
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None
        self._ending = False

    def add(self, work: MpiWork) -> None:
        """Take care of an operation."""
        with self._news:
            self._works.append(work)
            if self._thread is None:
                self._ending = False
                self._thread = threading.Thread(target=self._run, name="idist mpi progress", daemon=True)
                self._thread.start()
            self._news.notify()

    def stop(self) -> None:
        """End the thread; operations that have not ended fail."""
        with self._news:
            thread, self._thread = self._thread, None
            self._ending = True
            self._news.notify()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        idle_since = looked = time.monotonic()
        while True:
            with self._news:
                while not self._works and not self._ending:
                    self._news.wait()
                    idle_since = time.monotonic()
                if self._ending:
                    return
                works = list(self._works)
            now = time.monotonic()
            patient = now - looked < _LOOK_S
            looked = looked if patient else now
            ended = [work for work in works if (work.advance() if patient else work.look())]
            for work in ended:
                self._works.remove(work)
                work.settle()
            if ended:
                idle_since = now
            elif now - idle_since < _EAGER_S:
                _yield()
            else:
                time.sleep(_IDLE_S)


_progress = Progress()
stop_progress = _progress.stop
