"""What a process is told of its place: where the ranks meet, its variables, its share of the cores."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import secrets
import socket
from collections.abc import Mapping
from types import TracebackType

import torch.distributed as dist
from typing_extensions import Self

from idist.launchers.job import Job
from idist.launchers.payload import Streams
from idist.launchers.worker import Assignment
from idist.topology import Topology

_LOOPBACK = "127.0.0.1"


class Rendezvous:
    """The store where the ranks of one node meet; nothing, where the job names another place.

    The socket is bound and listens before any process starts, so there is no port to choose and
    none to lose; it is served after all have started, so that no forked process inherits the server.
    """

    def __init__(self, job: Job) -> None:
        self._listener = socket.create_server((_LOOPBACK, 0), backlog=1024) if job.serves_here else None
        self._port = self._listener.getsockname()[1] if self._listener else None
        self._token = secrets.token_hex(16)
        self._store: dist.Store | None = None

    def of(self, topology: Topology) -> Topology:
        """The topology, with the address of the store."""
        if self._port is None:
            return topology
        return dataclasses.replace(
            topology, master_addr=_LOOPBACK, master_port=self._port, store_served=True, job_token=self._token
        )

    def serve(self) -> None:
        """From now on the ranks can meet."""
        if self._listener is not None and self._port is not None:
            self._store = dist.TCPStore(
                _LOOPBACK,
                self._port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=self._listener.detach(),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        if self._listener is not None:
            self._listener.close()
        self._store = None  # frees it now, though the traceback of an error holds this object


def assignment(
    job: Job, topology: Topology, env: Mapping[str, str], *, streams: Streams | None = None, forked: bool = False
) -> Assignment:
    """What the process at this place is to be, with ``env`` and the variables of a launcher as its environment."""
    told = {
        "RANK": topology.rank,
        "WORLD_SIZE": topology.world_size,
        "LOCAL_RANK": topology.local_rank,
        "LOCAL_WORLD_SIZE": topology.nproc_per_node,
        "GROUP_RANK": topology.node_rank,
        "GROUP_WORLD_SIZE": topology.nnodes,
        "MASTER_ADDR": topology.master_addr,
        "MASTER_PORT": topology.master_port,
    }
    threads = 1 if forked else _threads(job.nproc_per_node, env)
    defaults = {"OMP_NUM_THREADS": str(threads)}
    return Assignment(
        backend=job.backend.name,
        topology=topology,
        environment=env,
        variables={
            **{name: value for name, value in defaults.items() if name not in env},
            **{name: str(value) for name, value in told.items() if value is not None},
        },
        threads=threads,
        start_method=multiprocessing.get_start_method(allow_none=True),
        streams=streams,
        forked=forked,
    )


def _threads(nproc_per_node: int, env: Mapping[str, str]) -> int:
    """So many that the processes of this node share its cores; what the user has set counts more.

    A forked process has one: it may hang in a second one if the threads of OpenMP were in use
    before the fork. https://gcc.gnu.org/bugzilla/show_bug.cgi?id=58378
    """
    wanted = env.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // nproc_per_node)
