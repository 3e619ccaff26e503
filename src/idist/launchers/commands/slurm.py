"""srun, and batch scripts for sbatch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import ClassVar

from idist.launchers.commands.base import Command, Request, Tool

_END_TOGETHER = "--kill-on-bad-exit=1"
_END_AT_ONCE = "--quit-on-interrupt"
_WHY = (
    f"added {_END_TOGETHER}: when one process fails the others end too, as with every other launcher",
    f"added {_END_AT_ONCE}: one Ctrl-C ends the job; srun alone wants two within a second",
)


class Srun(Tool):
    """One task per process. The numbers of the allocation count for what was not asked for.

    Source: https://slurm.schedmd.com/srun.html
    """

    flag: ClassVar[str] = "slurm"
    program: ClassVar[str] = "srun"
    source: ClassVar[str] = "It is on the machines of a Slurm cluster, its login node for one."
    takes: ClassVar[frozenset[str]] = frozenset({"nproc", "nnodes"})

    def command(self, request: Request, env: Mapping[str, str]) -> Command:
        """Inside an allocation or, where the cluster has a default partition, in one that srun asks for."""
        nnodes = request.nnodes or (_allocated_nodes(env) if request.nproc else None)
        options = (*_size(request.nproc, nnodes), _END_TOGETHER, _END_AT_ONCE)
        return Command((self.program, *options, *request.python), _WHY)


def batch_script(request: Request, directory: str) -> str:
    """A script for sbatch that runs ``request`` in ``directory``, wherever it is submitted from.

    Raises:
        ConfigError: as of a command line.
    """
    srun = Srun().checked(request, {}).argv[0]
    asked = "".join(f"#SBATCH {option}\n" for option in _size(request.nproc, request.nnodes or 1))
    run = shlex.join((srun, _END_TOGETHER, *request.python))
    return f"#!/bin/bash\n{asked}\ncd {shlex.quote(directory)} || exit\n{run}\n"


def _size(nproc: int | None, nnodes: int | None) -> tuple[str, ...]:
    """All three numbers: one that is left out may come from the allocation, and --ntasks outdoes the others."""
    if nproc is None:
        return (f"--nodes={nnodes}",) if nnodes else ()
    nnodes = nnodes or 1
    return f"--nodes={nnodes}", f"--ntasks={nnodes * nproc}", f"--ntasks-per-node={nproc}"


def _allocated_nodes(env: Mapping[str, str]) -> int | None:
    nodes = env.get("SLURM_JOB_NUM_NODES", "")
    return int(nodes) if nodes.isdecimal() else None
