"""Command lines of the real launchers: what `idist run` executes in its own place.

Add one: a file beside this one, and a line in ``TOOLS``.
"""

from __future__ import annotations

from idist.launchers.commands.base import Command, Request, Tool, spelled
from idist.launchers.commands.horovod import Horovodrun
from idist.launchers.commands.mpi import Mpiexec
from idist.launchers.commands.slurm import Srun, batch_script
from idist.launchers.commands.torchrun import Python, Torchrun

__all__ = ["PYTHON", "SRUN", "TOOLS", "TORCHRUN", "Command", "Request", "Tool", "batch_script", "spelled"]

TORCHRUN = Torchrun()
SRUN = Srun()
PYTHON = Python()

TOOLS: tuple[Tool, ...] = (TORCHRUN, SRUN, Mpiexec(), Horovodrun())
"""Those that a user can choose. Plain Python is what remains where there is nothing to launch."""
