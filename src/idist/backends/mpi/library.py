"""The MPI library of this process: which one it is, whether it can be used, and how this process takes its leave.

MPI knows neither timeouts nor that a rank has ended while others wait for it. Both are made here:
a rank that raises ends the whole job, and one that ends says so to whoever then waits for it.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import logging
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from idist.errors import ConfigError, LaunchError
from idist.topology import Topology

logger = logging.getLogger("idist")

_LEFT = 1
_TOLD_BYTES = 512
_GRACE_S = 1.0
_SHOWING_S = 0.3
"""What mpiexec gets to pass on what was shown, before it ends everything."""
_POLL_S = 0.001
_SEGMENT = re.compile(r"/dev/shm/mpich_shm_\w+")
_PROBE = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
_PROBE_S = 60
_WATCH = """
import os, select, signal, sys
if not select.select([0], [], [], float(sys.argv[2]))[0]:
    os.write(2, sys.argv[3].encode())
    os.kill(int(sys.argv[1]), signal.SIGKILL)
"""
# What the launcher of each family sets for the processes that it starts.
_LAUNCHERS = {"Open MPI": "OMPI_COMM_WORLD_SIZE", "MPICH": "PMI_SIZE"}


@cache
def probe() -> tuple[str, str]:
    """The library's name and version, or nothing and why there is none.

    Asked in another process, unless mpi4py is in use here: to load it here would start MPI, or keep
    the user's own import from doing so.
    """
    if "mpi4py.MPI" in sys.modules:
        return _name(sys.modules["mpi4py.MPI"].Get_library_version()), ""
    if importlib.util.find_spec("mpi4py") is None:
        return "", "mpi4py is not installed"
    command = [sys.executable, "-c", _PROBE]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PROBE_S)
    except subprocess.TimeoutExpired:
        return "", f"mpi4py could not be loaded in {_PROBE_S} s"
    if told.returncode:
        return "", f"mpi4py finds no MPI library: {(told.stderr.strip().splitlines() or ['it says nothing'])[-1]}"
    return _name(told.stdout), ""


def _name(version: str) -> str:
    """``Open MPI v5.0.11`` or ``MPICH Version: 5.0.2``, without all that they were built with."""
    return " ".join(version.partition("\n")[0].partition(",")[0].split())


def load(topology: Topology, env: Mapping[str, str], timeout: timedelta) -> Any:
    """``mpi4py.MPI``, started, with the ranks that ``topology`` tells. Where it does not start in time, we end.

    Raises:
        LaunchError: this process was not started by this library's own launcher.
        ConfigError: MPI was started without support for threads, or has ended.
    """
    _refuse_another_launcher(probe()[0], env)
    with _ending_if_late(topology, timeout.total_seconds()):
        from mpi4py import MPI

        if MPI.Is_finalized():
            raise ConfigError("MPI has been finalized in this process and cannot start again; leave that to its end")
        if not MPI.Is_initialized():  # the user has told mpi4py not to
            MPI.Init_thread(MPI.THREAD_MULTIPLE)
            atexit.register(MPI.Finalize)
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        levels = ("MPI_THREAD_SINGLE", "MPI_THREAD_FUNNELED", "MPI_THREAD_SERIALIZED")
        told = dict(zip((MPI.THREAD_SINGLE, MPI.THREAD_FUNNELED, MPI.THREAD_SERIALIZED), levels, strict=True))
        raise ConfigError(
            f"MPI was started with {told[MPI.Query_thread()]}, but DDP needs MPI_THREAD_MULTIPLE. Let idist or "
            "`from mpi4py import MPI` start it, and set neither mpi4py.rc.thread_level nor mpi4py.rc.threads."
        )
    _refuse_another_world(MPI.COMM_WORLD, topology)
    abort_on_errors(MPI)
    return MPI


@contextlib.contextmanager
def _ending_if_late(topology: Topology, seconds: float) -> Iterator[None]:
    """End this process if the block takes longer than that.

    MPI waits for all ranks when it starts, for ever if one has failed before, and holds the interpreter's lock
    meanwhile: only another process can look at the clock.
    """
    told = (
        f"idist: rank {topology.rank} of {topology.world_size}: MPI has not started within {seconds:g} s. It waits "
        "for all ranks: one has most likely failed before it came here, and what that has printed says why.\n"
    )
    watch = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCH, str(os.getpid()), str(seconds), told], stdin=subprocess.PIPE
    )
    with watch:  # it ends when its input does
        yield


def _refuse_another_launcher(version: str, env: Mapping[str, str]) -> None:
    """Before MPI starts: what it then does is to abort without a word of why, or to start as many worlds of one."""
    ours = "Open MPI" if version.startswith("Open MPI") else "MPICH"  # and what descends from it: Intel MPI, Cray MPICH
    for family, variable in _LAUNCHERS.items():
        if variable in env and family != ours and _LAUNCHERS[ours] not in env:
            raise LaunchError(
                f"the wrong mpiexec: {family}'s has started this process ({variable}={env[variable]}), but mpi4py uses "
                f"{version}. Start with the mpiexec of that ({os.path.join(sys.prefix, 'bin', 'mpiexec')}, if it came "
                "by pip), or install mpi4py for the other."
            )


def _refuse_another_world(world: Any, topology: Topology) -> None:
    rank, size = world.Get_rank(), world.Get_size()
    if (rank, size) != (topology.rank, topology.world_size):
        raise LaunchError(
            f"{topology.environment} tells rank {topology.rank} of {topology.world_size} "
            f"({', '.join(topology.evidence)}), but for {probe()[0]} this is rank {rank} of {size}: it was not started "
            "as an MPI job. Use `mpiexec -n N python ...`, or on Slurm an srun --mpi that this library supports; or "
            "another backend."
        )


def told_by_rank_0(mpi: Any, timeout: timedelta) -> tuple[str, str]:
    """The host of rank 0, and a token that only the ranks of this job know.

    Rank 0 writes to each of the others and waits for none: the meeting that follows tells who is missing.
    In a broadcast a rank may depend on another than rank 0, which then would be blamed.

    Raises:
        LaunchError: rank 0 does not come in time.

    Cost: one message of 512 bytes from rank 0 to every other.
    """
    world = mpi.COMM_WORLD
    tag = world.Get_attr(mpi.TAG_UB)  # hardly one that the user's own messages have
    if world.Get_rank() == 0:
        host, token = socket.getfqdn(), f"mpi-{secrets.token_hex(16)}"
        said = f"{host} {token}".encode().ljust(_TOLD_BYTES)
        telling = [world.Isend([said, mpi.BYTE], rank, tag) for rank in range(1, world.Get_size())]
        threading.Thread(target=_see_off, args=(mpi, telling), name="idist mpi address", daemon=True).start()
        return host, token
    told = bytearray(_TOLD_BYTES)
    hearing = world.Irecv([told, mpi.BYTE], 0, tag)
    seconds = timeout.total_seconds()
    deadline = time.monotonic() + seconds
    while not hearing.Test():
        if time.monotonic() > deadline:
            hearing.Cancel()
            hearing.Wait()
            raise LaunchError(
                f"rank {world.Get_rank()} of {world.Get_size()} waited {seconds:.0f} s for rank 0, which has not come "
                "to initialize. What rank 0 printed says why."
            )
        time.sleep(_POLL_S)
    host, token = told.decode().split()
    return host, token


def _see_off(mpi: Any, messages: list[Any]) -> None:
    """Let MPI move them: over a network it does so only in its own calls, and rank 0 is busy with other things."""
    while not mpi.Request.Testall(messages):
        time.sleep(_POLL_S)


# The end of the job


def forget_shared_memory() -> None:
    """Remove the name of the shared memory in which the ranks of a node meet, which they all have mapped by now.

    MPICH does so when MPI ends, and so not at all if the job is killed or aborted: the memory would stay until the
    machine is started anew.
    """
    with contextlib.suppress(FileNotFoundError):  # there is no /proc
        for line in Path("/proc/self/maps").read_text().splitlines():
            if (found := _SEGMENT.search(line)) is not None:
                Path(found.group()).unlink(missing_ok=True)


class _Abort:
    """A hook for exceptions that nobody catches: it shows them, and then ends all ranks."""

    _showing = False

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        self._process = os.getpid()
        self._show = sys.excepthook

    def __call__(self, kind: type[BaseException], error: BaseException, frames: TracebackType | None, /) -> None:
        if _Abort._showing:  # an older hook of ours, that torch's calls
            self._show(kind, error, frames)
            return
        _Abort._showing = True
        self._show(kind, error, frames)
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        if os.getpid() == self._process and self._mpi.COMM_WORLD.Get_size() > 1:
            time.sleep(_SHOWING_S)
            self._mpi.COMM_WORLD.Abort(1)


def abort_on_errors(mpi: Any) -> None:
    """From now on, a rank that ends of an exception takes the job with it: the others would wait for ever.

    torch puts a hook of its own in front of what is there, at each start, and holds back what is shown until it ends.
    """
    if not isinstance(sys.excepthook, _Abort):
        sys.excepthook = _Abort(mpi)


class Departures:
    """Which ranks have ended, or are about to.

    A rank that ends waits for all others to end, as MPI wants it, and tells those that have not after a
    moment. Whoever waits for it in vain finds that out here.

    Args:
        control: a communicator of all ranks, for this alone.
    """

    def __init__(self, mpi: Any, control: Any) -> None:
        self._mpi = mpi
        self._control = control
        self._process = os.getpid()
        self._gone: dict[int, float] = {}

    def noticed(self) -> Mapping[int, float]:
        """The global ranks that have ended, and when that was noticed, by :func:`time.monotonic`."""
        status = self._mpi.Status()
        while (message := self._control.Improbe(self._mpi.ANY_SOURCE, _LEFT, status)) is not None:
            message.Recv([None, 0, self._mpi.BYTE])
            self._gone[status.Get_source()] = time.monotonic()
        return self._gone

    def leave(self) -> None:
        """Wait until all ranks come here. Those that come late are told that this one has come."""
        if os.getpid() != self._process:  # a forked process, which MPI knows nothing of
            return
        all_left = self._control.Ibarrier()
        if not self._settled(all_left.Test, time.monotonic() + _GRACE_S):
            others = [rank for rank in range(self._control.Get_size()) if rank != self._control.Get_rank()]
            told = [self._control.Issend([None, 0, self._mpi.BYTE], rank, _LEFT) for rank in others]
            self._settled(all_left.Test)
            self._settled(lambda: self._mpi.Request.Testall(told))
        all_heard = self._control.Ibarrier()  # until then, somebody may still have to hear
        self._settled(all_heard.Test)

    def _settled(self, done: Callable[[], bool], deadline: float = float("inf")) -> bool:
        while not done():
            self.noticed()
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True


@cache
def departures(mpi: Any) -> Departures:
    """Of this process. All ranks call it at the same time, once; from then on the end of a rank is noticed."""
    tracker = Departures(mpi, mpi.COMM_WORLD.Dup())
    atexit.register(tracker.leave)
    return tracker
