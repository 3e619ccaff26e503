"""Where the ranks meet that mpiexec started: it leaves no address behind, and Hydra no job id either."""

from __future__ import annotations

import dataclasses
import os
import secrets
import socket
from pathlib import Path

from idist.errors import LaunchError
from idist.topology import Topology

_ADVICE = "Set MASTER_ADDR and MASTER_PORT to the host of rank 0 and a free port there (mpiexec passes them on)"


def locate(topology: Topology, deadline: float) -> Topology:
    """The topology with the host of rank 0 and a token that the ranks of this job alone share.

    On one node that is the loopback interface and the process id of the launcher; over several
    nodes rank 0 tells the others by MPI, which knows no deadline.

    Raises:
        LaunchError: several nodes, and no mpi4py that works with this mpiexec.

    Cost: nothing on one node; else MPI's start and one broadcast.
    """
    if topology.nnodes == 1:
        token = topology.job_token or f"mpiexec-{_launcher()}"
        return dataclasses.replace(topology, master_addr="127.0.0.1", job_token=token)
    host, token = _told_by_rank_0(topology)
    return dataclasses.replace(topology, master_addr=host, job_token=token)


def _launcher() -> int:
    """The nearest ancestor that has no rank: the launcher's process on this node, behind any wrapper script."""
    process = os.getpid()
    try:
        while b"\0PMI_RANK=" in b"\0" + Path(f"/proc/{process}/environ").read_bytes():
            status = Path(f"/proc/{process}/stat").read_text()
            process = int(status.rpartition(")")[2].split()[1])
    except OSError:  # no /proc, or another user's process
        return os.getppid()
    return process


def _told_by_rank_0(topology: Topology) -> tuple[str, str]:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"mpiexec started rank {topology.rank} of {topology.world_size} on several nodes and left no address to "
            f"meet at; mpi4py could exchange one, but: {error}. {_ADVICE}, or `pip install mpi4py` for this mpiexec."
        ) from error
    world = MPI.COMM_WORLD
    if world.Get_size() != topology.world_size:
        raise LaunchError(
            f"mpiexec started {topology.world_size} processes, but mpi4py sees {world.Get_size()}: it is for "
            f"another mpiexec. {_ADVICE}, or use the one that mpi4py is for."
        )
    told: tuple[str, str] = world.bcast((socket.getfqdn(), f"mpiexec-{secrets.token_hex(8)}"), root=0)
    return told
