"""Run by mpiexec as a script, once for each rank: gets from idist what to do, and tells it how that ended.

mpiexec ends all processes as soon as one has failed, and nobody then knows which was the first. So
the rank is a child of the process that mpiexec knows, which stays until idist has heard how the rank
ended. It imports the standard library alone: only the rank needs more.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import sys
from multiprocessing import forkserver, reduction, spawn
from multiprocessing.connection import Client, Connection
from pathlib import Path

_MOST_DESCRIPTORS = 256


def main(address: str) -> None:
    """Start the rank, see it off, and end as it did.

    Args:
        address: of the socket at which idist listens, in a folder of its own.
    """
    try:
        connection = Client(address, family="AF_UNIX")
    except OSError:  # whoever started us is gone
        _leave_nothing(Path(address))
        sys.exit(1)
    rank = os.fork()
    if not rank:
        _become_rank(connection)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # they are the rank's to hear
        signal.signal(number, signal.SIG_IGN)
    _, status = os.waitpid(rank, 0)
    exitcode = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(OSError):
        connection.send_bytes(str(exitcode).encode())
        connection.poll(None)  # until idist lets go, or is gone
    _leave_nothing(Path(address))
    sys.exit(exitcode if exitcode >= 0 else 128 - exitcode)


def _become_rank(connection: Connection) -> None:
    """What a process of multiprocessing does when it is spawned; see :class:`idist.launchers.mpi.Rank`."""
    me = {"pid": os.getpid(), "environment": dict(os.environ)}
    connection.send_bytes(json.dumps(me).encode())
    with socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        instructions, tracker, out, err, *descriptors = reduction.recvfds(channel, _MOST_DESCRIPTORS)
    connection.close()  # its end then tells of the end of the process that mpiexec knows
    for theirs, number in ((out, 1), (err, 2)):
        os.dup2(theirs, number)
        os.close(theirs)
    # Python has opened them as what mpiexec had given us: not a terminal.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=os.isatty(1))
    forkserver._forkserver._inherited_fds = descriptors  # type: ignore[attr-defined]
    spawn.spawn_main(pipe_handle=instructions, tracker_fd=tracker)


def _leave_nothing(address: Path) -> None:
    """Remove the socket and its folder, where idist has been killed before it could."""
    with contextlib.suppress(OSError):
        address.unlink(missing_ok=True)
        address.parent.rmdir()


if __name__ == "__main__":
    main(sys.argv[2])  # the first argument tells multiprocessing that it may spawn here
