"""Ranks, in every way that they can be started, that run the same function in step."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import idist
from idist import wire
from idist.testing import run_threads

Body = Callable[..., None]

COLLECTIVE_S = 20.0
"""Timeout of every collective: it ends before the deadline, so that its error is what is reported."""

BODY_S = 30.0
"""Deadline of a test body on all ranks."""

GRACE_S = 3.0
"""After a rank has failed: how long the others may take to say how they fared."""

START_S = 60.0
STOP_S = 10.0


class RankFailed(AssertionError):
    """A body failed on some ranks; the message has their tracebacks."""


class World(ABC):
    """A number of ranks.

    Attributes:
        backend: as ``idist.Parallel`` knows it, or what stands in for it.
        size: the number of ranks.
        deadline_s: of one test with all that it starts.
        body_s: of its body on all ranks.
        stop_s: of the end of the ranks.
    """

    deadline_s = 90
    body_s = BODY_S
    stop_s = STOP_S

    def __init__(self, backend: str, size: int) -> None:
        self.backend = backend
        self.size = size

    def __str__(self) -> str:
        return f"{self.backend}-{self.size}"

    def start(self) -> None:
        """Bring the ranks up."""

    def stop(self) -> None:
        """Take them down; nothing is left behind."""

    def repair(self) -> None:
        """Before a test: bring the ranks up again if a failure took them down."""

    @abstractmethod
    def run(self, body: Body, arguments: Mapping[str, Any]) -> None:
        """Call ``body(**arguments)`` on every rank.

        Raises:
            Exception: it raised on some rank, or a rank was not in step with the others afterwards.
        """


class Alone(World):
    """This process, which is the only rank."""

    def run(self, body: Body, arguments: Mapping[str, Any]) -> None:
        perform(body, arguments)


class Threads(World):
    """Ranks that are threads of this process."""

    def run(self, body: Body, arguments: Mapping[str, Any]) -> None:
        run_threads(perform, self.size, body, arguments, timeout=COLLECTIVE_S)


class Many(Threads):
    """Ranks that do as those of a large job, where a frame of each would be too much."""

    def run(self, body: Body, arguments: Mapping[str, Any]) -> None:
        usual, wire.GATHERED = wire.GATHERED, 1
        try:
            super().run(body, arguments)
        finally:
            wire.GATHERED = usual


class Processes(World):
    """Ranks that are processes of this machine. They live as long as all bodies succeed."""

    _launcher: threading.Thread | None = None
    _channels: Sequence[Connection] = ()
    _pids: Sequence[int] = ()
    _ended_with: str = ""

    def start(self) -> None:
        self._ended_with = ""
        ours, theirs = zip(*(Pipe() for _ in range(self.size)), strict=True)
        self._channels = ours
        self._launcher = threading.Thread(target=self._launch, args=(serve, theirs), daemon=True)
        self._launcher.start()
        self._pids = [pid for _, pid in self._answers(START_S)]
        for channel in theirs:
            channel.close()  # from now on, ours ends when the rank does

    def stop(self) -> None:
        if self._launcher is None:
            return
        for channel in self._channels:
            channel.send(None)
        self._join()
        assert not self._ended_with, f"{self} ended badly: {self._ended_with}"

    def repair(self) -> None:
        if self._launcher is None and self._channels:
            self.start()

    def run(self, body: Body, arguments: Mapping[str, Any]) -> None:
        job = pickle.dumps((body, dict(arguments)))  # tensors too by value
        try:
            for channel in self._channels:
                channel.send_bytes(job)
            answers = self._answers(self.body_s)
        except BaseException:
            self._kill()
            raise
        failures = [f"rank {rank}:\n{said}" for rank, said in answers if said is not None]
        if failures:  # the ranks are out of step; repair() brings up others
            self._kill()
            raise RankFailed("\n".join([*failures, f"what ended them: {self._ended_with}"]))

    def _launch(self, function: Body, argument: Any) -> None:
        try:
            with idist.Parallel(self.backend, nproc_per_node=self.size, timeout=COLLECTIVE_S) as parallel:
                parallel.run(function, argument)
        except Exception as error:
            self._ended_with = str(error)

    def _answers(self, seconds: float) -> list[tuple[int, Any]]:
        """What every rank says, in the order of the ranks. After a failure only of those that still talk."""
        waiting = {channel: rank for rank, channel in enumerate(self._channels)}
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        while waiting and time.monotonic() < deadline:
            for channel in wait(list(waiting), deadline - time.monotonic()):
                assert isinstance(channel, Connection)
                rank = waiting.pop(channel)
                try:
                    answers[rank] = channel.recv()
                except (EOFError, ConnectionError):
                    answers[rank] = "its process ended"
                if isinstance(answers[rank], str):
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        silent = sorted(waiting.values())
        if silent and not any(isinstance(said, str) for said in answers.values()):
            raise TimeoutError(f"{self}: ranks {silent} said nothing for {seconds} s. {self._ended_with}")
        return sorted(answers.items())

    def _kill(self) -> None:
        """One rank that dies takes the others with it."""
        for pid in self._pids[:1]:
            with suppress(ProcessLookupError):  # they are ending already
                os.kill(pid, signal.SIGKILL)
        self._join()

    def _join(self) -> None:
        assert self._launcher is not None
        launcher, self._launcher = self._launcher, None
        launcher.join(self.stop_s)
        for channel in self._channels:
            channel.close()
        left = [pid for pid in self._pids if _is_there(pid)]
        self._pids = ()
        assert not launcher.is_alive(), f"the launcher of {self} did not end"
        assert not left, f"the launcher of {self} left the processes {left} behind"


class Attached(World):
    """Every rank runs pytest, and this process is one of them. The first failure ends the run of this rank."""

    failed = False

    def __init__(self, backend: str) -> None:
        idist.initialize(backend, timeout=COLLECTIVE_S)
        super().__init__(backend, idist.get_world_size())

    def stop(self) -> None:
        idist.finalize()

    def run(self, body: Body, arguments: Mapping[str, Any]) -> None:
        try:
            perform(body, arguments)
        except BaseException:
            self.failed = True
            raise


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


ATTACH = "IDIST_ATTACH"
REPLICAS = "IDIST_REPLICAS"
"""How many ranks of XLA on the CPU are the only world, if it is set."""


@cache
def worlds() -> tuple[World, ...]:
    """All worlds that the suite runs in, the quick ones first."""
    if ATTACH in os.environ:
        return (Attached(os.environ[ATTACH]),)
    if REPLICAS in os.environ:
        from xla.replicas import Replicas

        return (Replicas(int(os.environ[REPLICAS])),)
    return (
        Alone("serial", 1),
        Threads("threads", 2),
        Threads("threads", 4),
        Many("many", 2),
        Processes("gloo", 2),
        Processes("gloo", 4),
    )


def perform(body: Body, arguments: Mapping[str, Any]) -> None:
    """One rank's part of a test, and a check that it has left the ranks in step."""
    body(**arguments)
    here = [body.__qualname__, sorted(map(str, arguments))]
    assert idist.all_gather(here) == [here] * idist.get_world_size(), "the ranks are not in step"


def serve(local_rank: int, channels: Sequence[Connection]) -> None:
    """A rank that is a process, with the channels of all."""
    for index, channel in enumerate(channels):
        if index != local_rank:
            channel.close()
    answer(channels[local_rank])


def answer(channel: Connection) -> None:
    """Perform what comes, say how it went, until nothing comes any more."""
    warnings.simplefilter("error")  # as it is for pytest
    channel.send(os.getpid())
    while (job := channel.recv()) is not None:
        body, arguments = job
        try:
            perform(body, arguments)
        except BaseException:
            channel.send(traceback.format_exc())
        else:
            channel.send(None)
