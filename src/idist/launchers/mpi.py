"""Start processes on this node with mpiexec: an MPI library connects only those that its own has started.

What runs in them is what runs in those of :mod:`idist.launchers.spawn`, and the same crew watches them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, reduction, resource_tracker, spawn
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext, SpawnProcess, set_spawning_popen
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

from idist.environments.mpi import Mpi
from idist.errors import ConfigError, LaunchError, WorkerFailed, describe_exit
from idist.launchers import mpi_worker
from idist.launchers.commands.base import Request
from idist.launchers.commands.mpi import Mpiexec
from idist.launchers.crew import POLL_S, Crew
from idist.launchers.job import Job
from idist.launchers.payload import Payload, is_only_here, is_open
from idist.launchers.place import Rendezvous, assignment
from idist.launchers.relay import passing_on_warnings
from idist.topology import Topology

logger = logging.getLogger("idist")

_LEAVING_S = 2.0
_TERMINATING_S = 1.0
# Open MPI would bind each process to one core, or to a few; no other launcher of ours binds any.
_UNBOUND = {"PRTE_MCA_hwloc_default_binding_policy": "none", "OMPI_MCA_hwloc_base_binding_policy": "none"}


def launch(
    job: Job, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], env: Mapping[str, str]
) -> list[Any]:
    """See :func:`idist.launchers.launch`. All that is to be sent is pickled before mpiexec starts."""
    if is_only_here(fn):
        raise ConfigError(
            f"the function {getattr(fn, '__qualname__', fn)} was typed where no other process can import it, and "
            f"mpiexec starts new processes for backend {job.backend.name!r}. Put it into a module, a .py file, and "
            "import it from there."
        )
    command = _command(job.nproc_per_node, env)
    logger.info("%s runs in %d processes of %s", getattr(fn, "__qualname__", fn), job.nproc_per_node, command[0])
    payload = Payload(fn, args, kwargs, job.options)
    with (
        passing_on_warnings() as relay,
        Rendezvous(job) as rendezvous,
        _Launcher(command, env) as launcher,
        Crew(launcher, daemon=job.daemon, patience=job.timeout) as crew,
    ):
        for rank in job.ranks:
            place = assignment(job, rendezvous.of(job.topology(rank)), env)
            # mpiexec adds variables of its own to those that it got.
            crew.start(rank, dataclasses.replace(place, environment=None), payload)
        rendezvous.serve()
        launcher.start(job.timeout.total_seconds())
        relay.to = crew.signal
        try:
            return crew.results()
        except WorkerFailed as error:
            raise launcher.explained(error) from error.__cause__


def _command(nproc: int, env: Mapping[str, str]) -> tuple[str, ...]:
    """The command line but for the address, its last argument; on this host, also inside an allocation of many.

    Raises:
        LaunchError: there is no mpiexec.
    """
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    script = (*flags, mpi_worker.__file__, "--multiprocessing-fork")
    tool = Mpiexec()
    return tool.found(tool.checked(Request(script=script, nproc=nproc, hosts=("localhost",)), env), env).argv


class Passed:
    """A descriptor that comes with what has been pickled, by its number among those."""

    def __init__(self, number: int) -> None:
        self._number = number

    def detach(self) -> int:
        """The descriptor."""
        passed = forkserver.get_inherited_fds()
        assert passed is not None
        return passed[self._number]


class Rank:
    """A process, as :class:`Crew` needs those of multiprocessing. It comes when mpiexec lets it.

    What it is to do is pickled by :meth:`start` all the same: only then can pipes be, and an error
    is told before anything runs. The methods with names of multiprocessing are for its picklers.

    Attributes:
        lost: whether the process that mpiexec knows was killed, and could not tell how the rank ended.
    """

    DupFd = Passed

    def __init__(self, launcher: _Launcher, **what: Any) -> None:
        self._launcher = launcher
        self._process = SpawnProcess(**what)
        self._instructions = b""
        self._descriptors: list[int] = []
        self._connection: Connection | None = None
        self._writer = -1  # the process takes us for dead when it is closed
        self.lost = False
        self.pid: int | None = None
        self._exitcode: int | None = None

    def start(self) -> None:
        """Make ready what the process gets."""
        file = io.BytesIO()
        set_spawning_popen(self)  # type: ignore[arg-type]
        try:
            reduction.dump(spawn.get_preparation_data(self._process.name), file)
            reduction.dump(self._process, file)
        finally:
            set_spawning_popen(None)
        self._instructions = file.getvalue()

    def duplicate_for_child(self, descriptor: int) -> int:
        """The number of a descriptor among those that the process gets."""
        self._descriptors.append(os.dup(descriptor))
        return len(self._descriptors) - 1

    def begin(self, connection: Connection, pid: int) -> None:
        """It has come."""
        self._connection, self.pid = connection, pid
        reader, self._writer = os.pipe()
        with (
            open(os.devnull, "r+b") as nowhere,
            open(self._writer, "wb", closefd=False) as instructions,
            socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as channel,
        ):
            streams = [number if is_open(number) else nowhere.fileno() for number in (1, 2)]
            tracker: Any = resource_tracker.getfd()  # declared as if there might be none
            reduction.sendfds(channel, [reader, tracker, *streams, *self._descriptors])
            os.close(reader)
            instructions.write(self._instructions)
        self._forget()

    @property
    def sentinel(self) -> int:
        """Tells when the process has ended."""
        assert self._connection is not None
        return self._connection.fileno()

    @property
    def exitcode(self) -> int | None:
        """``None`` as long as it runs. mpiexec may have ended the one that would tell: then it ends, too."""
        if self._exitcode is None and self._connection is not None and self.pid is not None:
            gone = self._launcher.exitcode is not None  # asked first: a process of it says nothing more
            try:
                if self._connection.poll():
                    self._exitcode = int(self._connection.recv_bytes())
                    return self._exitcode
            except (EOFError, OSError):
                gone = True
            if gone:
                self.lost, self._exitcode = True, -signal.SIGKILL
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
        return self._exitcode

    def close(self) -> None:
        """Let go of it."""
        self._forget()
        if self._connection is not None:
            self._connection.close()
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1

    def _forget(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())
        self._instructions = b""


class _Launcher(BaseContext):
    """mpiexec, started when all is ready, for a :class:`Crew` in the place of a context of multiprocessing.

    Args:
        command: but for the address at which its processes call us.
        env: its environment, and so that of its processes.
    """

    _name = "mpiexec"

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._command = command
        self._env = {**_UNBOUND, **env}
        self._ranks: list[Rank] = []
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end of this context
        self._process: subprocess.Popen[bytes] | None = None

    def Process(self, **what: Any) -> Rank:
        """The next rank."""
        self._ranks.append(Rank(self, **what))
        return self._ranks[-1]

    @property
    def exitcode(self) -> int | None:
        """Of mpiexec itself, ``None`` as long as it runs."""
        return None if self._process is None else self._process.poll()

    def start(self, seconds: float) -> None:
        """Start mpiexec, and give each of its processes what it is to do.

        Raises:
            LaunchError: they do not come in time, or are not the ranks that they should be.
        """
        with tempfile.TemporaryDirectory(prefix="idist-") as folder, socket.socket(socket.AF_UNIX) as listener:
            address = str(Path(folder, "calls"))
            listener.bind(address)
            listener.listen(len(self._ranks))
            self._process = subprocess.Popen(
                [*self._command, address],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us: mpiexec would kill its processes
            )
            deadline = time.monotonic() + seconds
            while missing := [str(rank) for rank, process in enumerate(self._ranks) if process.pid is None]:
                if select.select([listener], [], [], POLL_S)[0]:
                    self._welcome(Connection(listener.accept()[0].detach()))
                elif self.exitcode is not None:
                    raise self._failed(
                        f"ended with {describe_exit(self.exitcode)} before rank {', '.join(missing)} came"
                    )
                elif time.monotonic() > deadline:
                    raise self._failed(f"did not bring rank {', '.join(missing)} within {seconds:g} s")

    def explained(self, error: WorkerFailed) -> WorkerFailed:
        """The error, with what mpiexec has to say of it where it ended first."""
        lost = self._ranks[error.rank].lost
        if lost and self._process is not None:  # by mpiexec, most likely, which is about to end, too
            _ends(self._process, _TERMINATING_S)
        if self.exitcode is None:
            return error
        ended = f"mpiexec itself had ended: {describe_exit(self.exitcode)}. {self._told()}"
        if lost:
            ended += "\n\nIt ends all ranks at once and does not tell which failed first; what they printed above may."
        return WorkerFailed(error.rank, error.exitcode, f"{error.details}\n\n{ended}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        try:
            for rank in self._ranks:
                rank.close()
            if self._process is not None:
                self._end(self._process)
        finally:
            self._said.close()

    def _welcome(self, connection: Connection) -> None:
        try:
            said = json.loads(connection.recv_bytes())
            place = Mpi().detect(said["environment"])
            if not isinstance(place, Topology) or place.world_size != len(self._ranks):
                connection.close()
                raise self._failed(f"started a process that is not one of {len(self._ranks)} ranks: {place}")
            self._ranks[place.rank].begin(connection, said["pid"])
        except (EOFError, OSError) as error:
            raise self._failed(f"started a process that could not be told what to do: {error!r}") from error

    def _failed(self, how: str) -> LaunchError:
        return LaunchError(f"{self._command[0]} {how}. {self._told()}")

    def _told(self) -> str:
        self._said.seek(0)
        text = self._said.read().decode(errors="replace").strip()
        return f"It said:\n\n{text}" if text else "It said nothing."

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """It ends when its processes have; those that have not come yet may not know that they are to end."""
        try:
            if all(rank.pid is not None for rank in self._ranks) and _ends(process, _LEAVING_S):
                return
            process.terminate()
            _ends(process, _TERMINATING_S)
        finally:
            process.kill()
            process.wait()


def _ends(process: subprocess.Popen[bytes], seconds: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return True
    return False
