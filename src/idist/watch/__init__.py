"""What to say when the ranks wait for each other in vain: who is in which operation, and what the others do instead.

Each rank has a thread that looks now and then where the rank is. One whose rank has stood in an operation for long
rings, by way of the store at which the ranks have met; all ranks then say where they are, and one prints it. A
collective knows nothing of this, and while nothing hangs a rank asks the store one short question at each look.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch.distributed as dist

from idist import rendezvous
from idist.backends.base import Backend, Pending
from idist.watch.report import Statement, render, render_alone
from idist.watch.stacks import Place, footprint, place_of

__all__ = ["Watch"]

_LOOKS = 10
"""How often a rank looks in the time after which it rings."""

_SLOWEST_LOOK_S = 3.0
_LONGEST_PATIENCE_S = 15.0
"""Ranks are given half of that time to answer, but no longer than this."""

_JOIN_S = 1.0


class Watch:
    """The thread of one rank that looks where the rank is; the rank is the thread that makes this.

    Args:
        backend: started or adopted.
        warn_after: seconds in one operation; where the timeout is not twice as long, half of that.
        concerns: whether the backend is still the one in use.
    """

    def __init__(self, backend: Backend, warn_after: float, concerns: Callable[[], bool]) -> None:
        self._backend = backend
        timeout = backend.timeout
        self._warn_after = warn_after if timeout is None else min(warn_after, timeout.total_seconds() / 2)
        self._patience = min(self._warn_after / 2, _LONGEST_PATIENCE_S)
        self._pause = min(self._warn_after / _LOOKS, _SLOWEST_LOOK_S)
        self._concerns = concerns
        self._rank_thread = threading.get_ident()
        self._process = os.getpid()
        self._ended = threading.Event()
        self._looked = self._since = self._idle_since = time.monotonic()
        self._footprint: object = None
        self._place: Place | None = None
        self._begun: dict[str, int] = {}
        self._pending: list[Pending] | None = None
        self._told = False
        self._store: dist.Store | None = None
        self._store_is_gone = False
        self._episode = 0
        self._asked_at: float | None = None
        self._report = ""
        self._hook: Any = None
        self._thread = threading.Thread(target=self._run, name="idist watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. A forked process has none."""
        if os.getpid() != self._process:
            return
        self._ended.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_S)
        if self._hook is not None and sys.excepthook is self._hook[0]:
            sys.excepthook = self._hook[1]

    def explain(self, error: BaseException) -> None:
        """Add the report to what the rank raises, if it is raised where the report has found it."""
        if not self._report or self._report in str(error) or self._backend.begun() != self._begun:
            return
        if isinstance(error, RuntimeError) and len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (f"{error.args[0]}\n\n{self._report}",)
        elif hasattr(error, "add_note"):  # of Python 3.11
            error.add_note(self._report)

    # Looking

    def _run(self) -> None:
        while not self._ended.wait(self._pause) and self._concerns():
            self._look()
            self._talk()
            self._looked = time.monotonic()  # a store that does not answer takes its time

    def _look(self) -> None:
        now = time.monotonic()
        seen, begun = footprint(self._rank_thread), self._backend.begun()
        slept = now - self._looked > self._warn_after / 2  # a process that was stopped has not waited
        if begun != self._begun or slept:
            self._begun, self._idle_since, self._report = begun, now, ""
        elif seen == self._footprint:
            return
        self._footprint, self._since, self._told, self._pending = seen, now, False, None

    def _waits(self, seconds: float) -> Place | None:
        """The place, if the rank has been so long in an operation."""
        if time.monotonic() - self._since < seconds:
            return None
        if self._pending is None:
            self._pending = self._backend.pending()  # what is not there will not be, before another one is begun
        place = place_of(self._rank_thread)
        waits = place.operation is not None if self._pending is None else bool(self._pending)
        return place if place.certain or waits else None

    def _statement(self) -> Statement:
        waiting = self._waits(self._pause / 2)
        place = waiting or place_of(self._rank_thread)
        operation, ranks, number, group = "", None, 0, ""
        if waiting is not None:
            operation, ranks = waiting.operation or "an operation that it has begun before", waiting.ranks
            if self._pending:
                first = self._pending[0]
                number, group, ranks = first.number, first.group, ranks or first.ranks
                operation = operation if waiting.certain else f"{operation}: {first.what}"
            if ranks is not None and len(ranks) == self._backend.world_size:
                ranks = None
            if not group:
                group = "all" if ranks is None else ",".join(map(str, ranks))
                number = self._begun.get(group, 0)
        seconds = time.monotonic() - (self._idle_since if waiting is None else self._since)
        return Statement(
            rank=self._backend.rank,
            process=_process(),
            waits=waiting is not None,
            operation=operation,
            number=number,
            group=group,
            ranks=ranks,
            begun=self._begun,
            where=place.where,
            seconds=seconds,
            since=time.strftime("%H:%M:%S", time.localtime(time.time() - seconds)),
            stack=place.stack,
        )

    # Talking

    def _talk(self) -> None:
        try:
            store = self._reachable()
            if self._asked_at is None:
                self._listen(store)
            elif store.check([f"{self._episode}/report"]):
                self._hear(store.get(f"{self._episode}/report").decode())
            elif self._is_to_report(store):
                self._publish(store)
        except TimeoutError:
            served = "who serves it, rank 0 if no launcher does,"
            self._report_alone(f"the store of the job does not answer; {served} is stopped or out of reach")
        except (OSError, dist.DistError, ValueError):  # the last is torch's, of a group that is no more
            self._store_is_gone = True
            self._report_alone("there is no store to ask them by, or who served it, rank 0 if no launcher did, is gone")

    def _reachable(self) -> dist.Store:
        """The store, by a connection of our own: one wait of a rank blocks all others on its connection.

        Raises:
            TimeoutError: whoever serves it does not answer.
            OSError: nobody serves it any more, or it does not give out connections.
        """
        if self._store_is_gone:
            raise ConnectionError
        if self._store is None:
            store: Any = self._backend.store()
            if store is None:
                raise ConnectionError
            rendezvous.expect_answer(store)
            try:
                self._store = dist.PrefixStore("idist/watch", store.clone())
            except RuntimeError as error:
                raise ConnectionError from error
            self._store.set(f"process/{self._backend.rank}", _process())
            self._episode = self._store.add("episode", 0)
        else:
            rendezvous.expect_answer(self._store)
        return self._store

    def _listen(self, store: dist.Store) -> None:
        """Ring, if there is reason to; answer, if somebody has rung."""
        if not self._told and self._waits(self._warn_after):
            store.set(f"{self._episode}/bell", "")
        elif not store.check([f"{self._episode}/bell"]):
            return
        self._asked_at, self._told = time.monotonic(), True
        store.set(f"{self._episode}/{self._backend.rank}", self._statement().to_json())
        store.add(f"{self._episode}/answers", 1)

    def _is_to_report(self, store: dist.Store) -> bool:
        """Rank 0 is, when all have answered or had the time to; else the lowest that has answered."""
        rank, episode = self._backend.rank, self._episode
        assert self._asked_at is not None
        waited = time.monotonic() - self._asked_at
        if rank == 0:
            return waited > self._patience or store.add(f"{episode}/answers", 0) == self._backend.world_size
        lower = (f"{episode}/{other}" for other in range(rank))
        return waited > 1.5 * self._patience and not any(store.check([key]) for key in lower)

    def _publish(self, store: dist.Store) -> None:
        size = self._backend.world_size
        keys = {rank: f"{self._episode}/{rank}" for rank in range(size)}
        answered = {rank: store.get(key) for rank, key in keys.items() if store.check([key])}
        statements = [Statement.from_json(said) for said in answered.values()]
        places = {rank: f"process/{rank}" for rank in range(size) if rank not in answered}
        processes = {rank: store.get(key).decode() for rank, key in places.items() if store.check([key])}
        report = ""
        if any(each.waits for each in statements):  # if not, it has gone on meanwhile
            report = render(statements, size, processes, self._backend.traces_of_a_hang())
        store.set(f"{self._episode}/report", report)
        store.add("episode", 1)
        self._print(report)
        self._hear(report)

    def _hear(self, report: str) -> None:
        self._asked_at = None
        self._episode += 1
        self._keep(report)

    def _report_alone(self, why: str) -> None:
        """What this rank can tell where the others cannot be asked."""
        if self._told or self._waits(self._warn_after) is None:
            return
        self._told = True
        report = render_alone(self._statement(), self._backend.world_size, why, self._backend.traces_of_a_hang())
        self._print(report)
        self._keep(report)

    def _keep(self, report: str) -> None:
        """Have the report in what the rank raises, also where that is not by way of us: in the backward pass, say."""
        self._report = report
        if report and self._hook is None and self._rank_thread == threading.main_thread().ident:
            before = sys.excepthook

            def hook(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
                self.explain(error)
                before(kind, error, frames)

            self._hook = (hook, before)
            sys.excepthook = hook

    def _print(self, report: str) -> None:
        if report and sys.stderr is not None:
            sys.stderr.write(f"{report}\n")
            sys.stderr.flush()


def _process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
