"""Start processes on this node with :mod:`multiprocessing`, and let them meet."""

from __future__ import annotations

import builtins
import dataclasses
import logging
import multiprocessing
import os
import secrets
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import Self

from idist.errors import ConfigError
from idist.launchers.crew import Crew
from idist.launchers.job import Job
from idist.launchers.payload import Payload, Streams
from idist.launchers.relay import passing_on_warnings
from idist.launchers.worker import Assignment
from idist.topology import Topology

logger = logging.getLogger("idist")

_LOOPBACK = "127.0.0.1"
_PRELOADED = ("torch", "idist", "idist.launchers", "idist.launchers.server")


def launch(
    job: Job, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], env: Mapping[str, str]
) -> list[Any]:
    """Call ``fn(local_rank, *args, **kwargs)`` in new processes, the ranks of this node.

    Args:
        env: the environment of the processes, to which the variables of a launcher are added.

    Returns:
        What it returned, by local rank.

    Raises:
        ConfigError: ``fn`` or an argument cannot be sent to another process with this start
            method; no process was started.
        WorkerFailed: a process failed; all have ended.
    """
    method = job.start_method or _default_start_method(fn)
    if method == "fork":
        _refuse_forking_a_device_context()
    if method == "forkserver":
        _preload()
    logger.info("%s runs in %d processes (%s)", getattr(fn, "__qualname__", fn), job.nproc_per_node, method)
    context = multiprocessing.get_context(method)
    payload = Payload(fn, args, kwargs, job.options)
    with passing_on_warnings() as relay, _Rendezvous(job) as rendezvous, Crew(context, daemon=job.daemon) as crew:
        for rank in job.ranks:
            topology = rendezvous.of(job.topology(rank))
            crew.start(rank, _assignment(job, topology, method, env), payload)
        rendezvous.serve()
        relay.to = crew.signal
        return crew.results()


class _Rendezvous:
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


def _assignment(job: Job, topology: Topology, method: str, env: Mapping[str, str]) -> Assignment:
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
    threads = _threads(job.nproc_per_node, method, env)
    defaults = {"OMP_NUM_THREADS": str(threads)}
    if topology.nnodes == 1 and (interface := _loopback_interface()) is not None:
        defaults["GLOO_SOCKET_IFNAME"] = interface
    return Assignment(
        backend=job.backend.name,
        topology=topology,
        variables={**defaults, **env, **{name: str(value) for name, value in told.items() if value is not None}},
        threads=threads,
        start_method=multiprocessing.get_start_method(allow_none=True),
        streams=Streams() if method == "forkserver" else None,
        forked=method == "fork",
    )


def _threads(nproc_per_node: int, method: str, env: Mapping[str, str]) -> int:
    """So many that the processes of this node share its cores; what the user has set counts more.

    One, in a forked process: it may hang in a second one if the threads of OpenMP were in use
    before the fork. https://gcc.gnu.org/bugzilla/show_bug.cgi?id=58378
    """
    if method == "fork":
        return 1
    wanted = env.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // nproc_per_node)


def _loopback_interface() -> str | None:
    names = {name for _, name in socket.if_nameindex()}
    return next((name for name in ("lo", "lo0") if name in names), None)


def _default_start_method(fn: Callable[..., Any]) -> str:
    """Fork, where a new process could not import what the user has typed; else the fork server."""
    if "__IPYTHON__" in vars(builtins) or (_module_of(fn) == "__main__" and not _main_can_be_imported()):
        return "fork"
    methods = multiprocessing.get_all_start_methods()
    return "forkserver" if "forkserver" in methods else "spawn"


def _module_of(fn: Callable[..., Any]) -> str | None:
    fn = getattr(fn, "func", fn)  # of a functools.partial
    return getattr(fn, "__module__", None)


def _main_can_be_imported() -> bool:
    """Not if it is a notebook, an interactive session, ``-c``, standard input or a ``__main__.py``."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return not f".{spec.name}".endswith(".__main__")
    return os.path.isfile(getattr(main, "__file__", ""))


def _refuse_forking_a_device_context() -> None:
    for name in ("cuda", "xpu"):
        if getattr(torch, name).is_initialized():
            raise ConfigError(
                f"this process has used {name} already, and a forked process cannot use it again. Restart the kernel "
                f"and touch no {name} device before the processes are started (make models and tensors in the "
                "function), or put the function into a module and pass start_method='forkserver'."
            )


def _preload() -> None:
    """Have the fork server import what every worker needs; no use if it runs already, and no harm."""
    # What the user has asked it to import stays; there is no public name for it. The main module, which it imports
    # by default in some versions of Python, does not: what that starts would be inherited by every worker.
    asked = getattr(getattr(forkserver, "_forkserver", None), "_preload_modules", ())
    theirs = [name for name in asked if name not in ("__main__", *_PRELOADED)]
    forkserver.set_forkserver_preload([*_PRELOADED, *theirs])
