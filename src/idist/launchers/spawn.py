"""Start processes on this node with :mod:`multiprocessing`, and let them meet."""

from __future__ import annotations

import builtins
import logging
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from typing import Any

import torch

from idist.errors import ConfigError
from idist.launchers.crew import Crew
from idist.launchers.job import Job
from idist.launchers.payload import Payload, Streams, is_only_here
from idist.launchers.place import Rendezvous, assignment
from idist.launchers.relay import passing_on_warnings

logger = logging.getLogger("idist")

_PRELOADED = ("torch", "idist", "idist.launchers", "idist.launchers.server")


def launch(
    job: Job, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], env: Mapping[str, str]
) -> list[Any]:
    """See :func:`idist.launchers.launch`; by the start method of the job, or the one that suits ``fn``."""
    method = job.start_method or _default_start_method(fn)
    if method == "fork":
        _refuse_forking_a_device_context()
    if method == "forkserver":
        _preload()
    logger.info("%s runs in %d processes (%s)", getattr(fn, "__qualname__", fn), job.nproc_per_node, method)
    context = multiprocessing.get_context(method)
    payload = Payload(fn, args, kwargs, job.options, otherwise=", or pass start_method='fork'")
    with (
        passing_on_warnings() as relay,
        Rendezvous(job) as rendezvous,
        Crew(context, daemon=job.daemon, patience=job.timeout) as crew,
    ):
        for rank in job.ranks:
            topology = rendezvous.of(job.topology(rank))
            streams = Streams() if method == "forkserver" else None
            crew.start(rank, assignment(job, topology, env, streams=streams, forked=method == "fork"), payload)
        rendezvous.serve()
        relay.to = crew.signal
        return crew.results()


def _default_start_method(fn: Callable[..., Any]) -> str:
    """Fork, where a new process could not import what the user has typed; else the fork server."""
    if "__IPYTHON__" in vars(builtins) or is_only_here(fn):
        return "fork"
    methods = multiprocessing.get_all_start_methods()
    return "forkserver" if "forkserver" in methods else "spawn"


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
