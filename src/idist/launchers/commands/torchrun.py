"""torchrun, and plain Python where one process is all there is to start."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import ClassVar
from urllib.parse import urlsplit

from idist.errors import ConfigError
from idist.launchers.commands.base import Command, Request, Tool


class Python(Tool):
    """One process."""

    flag: ClassVar[str] = "python"
    program: ClassVar[str] = "one Python process"
    source: ClassVar[str] = ""
    takes: ClassVar[frozenset[str]] = frozenset()

    def command(self, request: Request, env: Mapping[str, str]) -> Command:
        """Run the script."""
        return Command(request.python)


class Torchrun(Tool):
    """torchrun, called as a module: it is then that of this Python, also where PATH has another or none.

    Source: https://docs.pytorch.org/docs/stable/elastic/run.html
    """

    flag: ClassVar[str] = "torchrun"
    program: ClassVar[str] = "torchrun"
    source: ClassVar[str] = ""
    takes: ClassVar[frozenset[str]] = frozenset({"nproc", "nnodes", "node_rank", "master"})

    def command(self, request: Request, env: Mapping[str, str]) -> Command:
        """Of one node alone, or of this one among several."""
        alone = request.nnodes in (None, 1) and request.node_rank is None and request.master is None
        nodes = ("--standalone",) if alone else self._one_of_several(request)
        processes = f"--nproc-per-node={request.nproc or 1}"
        # Options of the script that begin like some of torchrun's are an error ("ambiguous option") without it.
        end = ("--",) if any(argument.startswith("-") for argument in request.script) else ()
        return Command((sys.executable, "-m", "torch.distributed.run", *nodes, processes, *end, *request.script))

    @staticmethod
    def _one_of_several(request: Request) -> tuple[str, ...]:
        if request.nnodes is None or request.node_rank is None or request.master is None:
            raise ConfigError(
                "several nodes with torchrun need --nnodes, --node-rank, the index of this node, and --master, "
                "host:port of node 0: run the same command on every node, each with its own --node-rank"
            )
        if not 0 <= request.node_rank < request.nnodes:
            raise ConfigError(f"--node-rank is 0 to {request.nnodes - 1} with --nnodes {request.nnodes}")
        host, port = _address(request.master)
        return (
            f"--nnodes={request.nnodes}",
            f"--node-rank={request.node_rank}",
            f"--master-addr={host}",
            f"--master-port={port}",
        )


def _address(master: str) -> tuple[str, int]:
    try:
        url = urlsplit(f"//{master}")
        host, port = url.hostname, url.port
    except ValueError:  # a port that is none
        host = port = None
    if not host or not port:
        raise ConfigError(f"--master is host:port, for example node1:29500; got {master!r}")
    return host, port
