"""horovodrun."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from idist.errors import ConfigError
from idist.launchers.commands.base import Command, Request, Tool


class Horovodrun(Tool):
    """Source: https://horovod.readthedocs.io/en/stable/running_include.html."""

    flag: ClassVar[str] = "horovod"
    program: ClassVar[str] = "horovodrun"
    source: ClassVar[str] = (
        "It comes with Horovod, which tools/horovod-wheel.sh builds: see docs/backends/horovod.md of idist."
    )
    takes: ClassVar[frozenset[str]] = frozenset({"nproc", "hosts"})

    def command(self, request: Request, env: Mapping[str, str]) -> Command:
        """On this machine, or on ``hosts``, which it reaches by ssh."""
        if request.nproc is None:
            raise ConfigError("horovodrun needs --nproc, the number of processes per node")
        hosts = ("-H", ",".join(f"{host}:{request.nproc}" for host in request.hosts)) if request.hosts else ()
        total = request.nproc * max(1, len(request.hosts))
        return Command((self.program, "-np", str(total), *hosts, *request.python))
