"""How do processes start? A function in, the results by local rank out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from idist.launchers import spawn
from idist.launchers.job import Job, plan, refuse_unknown

__all__ = ["Job", "launch", "plan", "refuse_unknown"]


def launch(
    job: Job, fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], env: Mapping[str, str]
) -> list[Any]:
    """Call ``fn(local_rank, *args, **kwargs)`` in new processes, the ranks of this node.

    Args:
        env: the environment of the processes, to which the variables of a launcher are added.

    Returns:
        What it returned, by local rank.

    Raises:
        ConfigError: ``fn`` or an argument cannot be sent to another process; no process was started.
        LaunchError: the processes could not be started.
        WorkerFailed: a process failed; all have ended.
    """
    if job.backend.launcher == "mpiexec":
        from idist.launchers import mpi  # what few need

        return mpi.launch(job, fn, args, kwargs, env)
    if job.backend.launcher == "torch_xla.launch":
        from idist.launchers import xla

        return xla.launch(job, fn, args, kwargs, env)
    return spawn.launch(job, fn, args, kwargs, env)
