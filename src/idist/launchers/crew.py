"""The processes of one run: started together, watched together, ended together."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from idist.errors import ConfigError, IdistError, LaunchError, WorkerFailed, describe_exit
from idist.launchers import worker
from idist.launchers.payload import Payload
from idist.launchers.worker import Assignment, Lifeline, Raised, Returned

logger = logging.getLogger("idist")

POLL_S = 0.25
"""A descriptor that tells of a death may be held open by a grandchild, so we also look."""

SETTLE_S = 0.5
"""After the first failure: how long an earlier cause may take to be seen."""

INTERRUPT_S = 2.0
"""After Ctrl-C: how long workers may take to unwind before they are ended."""

_RESTED_S = 2.0
_ENDING_S = 0.5
_TERMINATING_S = 1.0
_KILLING_S = 5.0
_CHUNK = 1 << 20


class Crew:
    """Processes that live no longer than this context and no longer than this process.

    Args:
        context: of :mod:`multiprocessing`, one of its start methods.
        daemon: whether the processes may not start processes of their own.
        patience: how long a process may be stopped, as by SIGSTOP.
    """

    def __init__(self, context: BaseContext, *, daemon: bool, patience: timedelta) -> None:
        self._context: Any = context
        self._daemon = daemon
        self._patience_s = patience.total_seconds()
        self._members: list[_Member] = []
        self._lifeline, self._owner = context.Pipe(duplex=False)

    def start(self, rank: int, assignment: Assignment, payload: Payload) -> None:
        """Start a process that runs :func:`idist.launchers.worker.main`.

        Raises:
            ConfigError: the payload cannot be sent.
            LaunchError: the operating system refused.
        """
        forked = self._context.get_start_method() == "fork"
        lifeline = Lifeline(self._lifeline, self._owner if forked else None)
        orders, to_worker = self._context.Pipe(duplex=False)
        from_worker, report = self._context.Pipe(duplex=False)
        process = self._context.Process(
            name=f"{worker.NAME}{rank}",
            target=worker.main,
            args=(orders, report, lifeline, assignment, payload),
            daemon=self._daemon,
        )
        member = _Member(rank, process, to_worker, from_worker)
        self._members.append(member)
        try:
            process.start()
        except (OSError, EOFError) as error:
            raise LaunchError(f"the process of rank {rank} could not be started: {error!r}") from error
        finally:
            orders.close()
            report.close()
        member.send(payload.pickled)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all processes that have not ended."""
        for member in self._living():
            member.signal(number)

    def results(self) -> list[Any]:
        """What the functions returned, when all processes have ended well.

        Raises:
            WorkerFailed: one failed; the first, if several did.
            ConfigError: the main module starts processes when it is imported.
        """
        deadline = float("inf")
        while True:
            for member in self._members:
                member.look()
            failures = [found for member in self._members if (found := member.failure(self._patience_s)) is not None]
            if failures:
                failure = min(failures, key=lambda found: found.order)
                if failure.consequence:  # of the stop of another, most likely
                    failures = [found for member in self._members if (found := member.stop(0.0)) is not None]
                    failure = next(iter(failures), failure)
                deadline = min(deadline, time.monotonic() + SETTLE_S)
                if failure.is_cause or time.monotonic() >= deadline or all(m.settled for m in self._members):
                    raise self._told(failure)
            elif all(member.ended for member in self._members):
                return [member.value() for member in self._members]
            self._wait(min(POLL_S, max(0.0, deadline - time.monotonic())))

    def _told(self, failure: _Failure) -> IdistError:
        """With what explains it where no other rank failed: one was done, and had closed its connections."""
        error = failure.error
        done = [str(member.rank) for member in self._members if member.returned]
        if not (failure.consequence and done and isinstance(error, WorkerFailed)):
            return error
        hint = (
            f"\n\nNo other rank had failed, but rank{'s' * (len(done) > 1)} {', '.join(done)} had returned. "
            "Look for a call that only some ranks make, as under `if rank == 0:`: all have to make it."
        )
        return WorkerFailed(error.rank, error.exitcode, error.details + hint)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, KeyboardInterrupt):
                self._interrupt()
            self._end()
        except KeyboardInterrupt:  # once more: no more patience
            self._kill()
            raise
        finally:
            for member in self._members:
                member.close()
            self._owner.close()
            self._lifeline.close()

    def _wait(self, seconds: float) -> None:
        poll = select.poll()
        for member in self._members:
            for descriptor, event in member.awaited():
                poll.register(descriptor, event)
        poll.poll(seconds * 1000)

    def _wait_until(self, done: Callable[[_Member], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while True:
            for member in self._members:
                member.look()
            left = deadline - time.monotonic()
            if all(map(done, self._members)) or left <= 0:
                return left > 0
            self._wait(min(left, POLL_S))

    def _interrupt(self) -> None:
        """The workers of a terminal have been interrupted as well; if we alone were, pass it on."""
        for member in self._living():
            member.signal(signal.SIGINT)
        self._wait_until(lambda member: member.settled, INTERRUPT_S)

    def _end(self) -> None:
        self._owner.close()
        if self._wait_until(lambda member: member.ended, _ENDING_S):
            return
        for member in self._living():  # it holds the interpreter lock in C code, or is stopped
            member.signal(signal.SIGTERM)
        if not self._wait_until(lambda member: member.ended, _TERMINATING_S):
            self._kill()

    def _kill(self) -> None:
        for member in self._living():
            member.signal(signal.SIGKILL)
        if not self._wait_until(lambda member: member.ended, _KILLING_S):
            stuck = ", ".join(str(member.process.pid) for member in self._living())
            logger.warning("process %s cannot be killed: it waits in the kernel, most likely for a device", stuck)

    def _living(self) -> Iterable[_Member]:
        return [member for member in self._members if not member.ended]


def _is_stopped(pid: int) -> bool:
    """By a signal, not by a debugger; where there is no /proc, nobody knows."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


class _Failure:
    """An error, and what tells whether it is the first.

    A process that ended without a report comes first: others only see its connections close, and
    a worker that has reported stays until it is ended. Then what does not look like a consequence.
    """

    def __init__(self, error: IdistError, *, is_cause: bool, consequence: bool, at: float) -> None:
        self.error = error
        self.is_cause = is_cause
        self.consequence = consequence
        self.order = (not is_cause, consequence, at)


class _Member:
    """One process and what it has said."""

    def __init__(self, rank: int, process: Any, writer: Connection, reader: Connection) -> None:
        self.rank = rank
        self.process = process
        self._writer = writer
        self._unsent = memoryview(b"")
        self._reader = reader
        self._said = bytearray()
        self._hears = True
        for pipe in (reader, writer):  # one that stops in the middle of a message must not stop us
            os.set_blocking(pipe.fileno(), False)
        self._outcome: Returned | Raised | None = None
        self._exitcode: int | None = None
        self._ended_at = 0.0
        self._looked_at = 0.0
        self._stopped_at: float | None = None

    @property
    def ended(self) -> bool:
        return self._exitcode is not None or self.process.pid is None

    @property
    def settled(self) -> bool:
        """Whether nothing more is to be learned from it."""
        return self.ended or self._outcome is not None

    @property
    def returned(self) -> bool:
        """Whether its function has, and the rank has left the others."""
        return isinstance(self._outcome, Returned)

    def awaited(self) -> Iterator[tuple[int, int]]:
        """The descriptors that tell of news, each with what to wait for."""
        if self._hears:
            yield self._reader.fileno(), select.POLLIN
        if self._unsent:
            yield self._writer.fileno(), select.POLLOUT
        if not self.ended:
            yield self.process.sentinel, select.POLLIN

    def look(self) -> None:
        """Take in the news, and send what can be sent."""
        ended_now = not self.ended and self.process.exitcode is not None
        self._write()
        self._read()  # after the exit code: a process that has ended says nothing more
        if ended_now:
            self._ended_at = time.monotonic()
            self._exitcode = self.process.exitcode
        self._look_whether_stopped(time.monotonic())

    def _look_whether_stopped(self, now: float) -> None:
        """Ctrl-Z stops us as well, and we may go on before the others do: what was before does not count then."""
        rested = now - self._looked_at > _RESTED_S
        self._looked_at = now
        if self.ended or not _is_stopped(self.process.pid):
            self._stopped_at = None
        elif self._stopped_at is None or rested:
            self._stopped_at = now

    def send(self, message: bytes) -> None:
        """Send it bit by bit, as the process takes it."""
        self._unsent = memoryview(message)
        self._write()

    def stop(self, patience_s: float) -> _Failure | None:
        """The failure that it has been stopped for so long, if it is not done yet."""
        if self._stopped_at is None or self._outcome is not None or self._looked_at - self._stopped_at < patience_s:
            return None
        details = (
            f"Process {self.process.pid} is stopped, as by SIGSTOP, and was ended: the others cannot go on without it."
        )
        return _Failure(WorkerFailed(self.rank, None, details), is_cause=True, consequence=False, at=self._stopped_at)

    def failure(self, patience_s: float) -> _Failure | None:
        if isinstance(self._outcome, Raised):
            raised = self._outcome
            error: IdistError = WorkerFailed(self.rank, raised.exitcode, raised.details)
            return _Failure(error, is_cause=False, consequence=raised.consequence, at=raised.at)
        if self._exitcode is None or self._outcome is not None:
            return self.stop(patience_s)
        return _Failure(self._silent_death(self._exitcode), is_cause=True, consequence=False, at=self._ended_at)

    def value(self) -> Any:
        assert isinstance(self._outcome, Returned)
        if self._exitcode:
            logger.warning("rank %d returned, and then ended with %s", self.rank, describe_exit(self._exitcode))
        try:
            return pickle.loads(self._outcome.value)  # noqa: S301 - from a process that we started
        except Exception as error:  # whatever a class of the user raises
            details = f"What it returned cannot be rebuilt here: {type(error).__name__}: {error}"
            raise WorkerFailed(self.rank, self._exitcode, details) from error

    def signal(self, number: signal.Signals) -> None:
        if self.process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

    def close(self) -> None:
        self._reader.close()
        self._writer.close()
        if self.ended and self.process.pid is not None:
            self.process.close()

    def _write(self) -> None:
        while self._unsent:
            try:
                sent = os.write(self._writer.fileno(), self._unsent[:_CHUNK])
            except BlockingIOError:
                return
            except BrokenPipeError:  # it has ended, and how it did is told elsewhere
                sent = len(self._unsent)
            self._unsent = self._unsent[sent:]

    def _read(self) -> None:
        while self._hears:
            try:
                chunk = os.read(self._reader.fileno(), _CHUNK)
            except BlockingIOError:
                break
            self._said += chunk
            self._hears = bool(chunk)
        start = len(worker.BEGUN) + worker.LENGTH.size
        if self._outcome is None and len(self._said) >= start:
            (length,) = worker.LENGTH.unpack_from(self._said, len(worker.BEGUN))
            if len(self._said) >= start + length:
                self._outcome = pickle.loads(memoryview(self._said)[start:])  # noqa: S301 - as above
                self._said = bytearray(worker.BEGUN)

    def _silent_death(self, exitcode: int) -> IdistError:
        if exitcode == worker.UNGUARDED and not self._said:
            return ConfigError(
                "the main module starts processes when it is imported, and every process that it starts imports it, "
                "to find your functions. Put the code that uses idist.Parallel or idist.spawn under\n\n"
                '    if __name__ == "__main__":\n'
            )
        details = f"Process {self.process.pid} ended without a report: {describe_exit(exitcode)}."
        if not self._said:
            details += " It had not got as far as calling the function; what it printed above may tell why."
        elif exitcode == -signal.SIGKILL:
            details += " When memory runs out, the kernel kills so: see `dmesg`."
        elif exitcode == -signal.SIGABRT:
            details += (
                " A library ended it, and says above why. One that moves tensors may do so where the ranks' tensors"
                " differ in size: IDIST_VERIFY=1 makes that an error that names the ranks."
            )
        return WorkerFailed(self.rank, exitcode, details)
