"""MPI on any torch, by way of mpi4py. Where torch was built with MPI, its own backend has the name instead."""

from __future__ import annotations

import dataclasses
import os
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from idist.backends.base import Pending
from idist.backends.c10d import C10d, begun_in
from idist.backends.mpi import library
from idist.rendezvous import DEFAULT_TIMEOUT
from idist.topology import Topology

_NAME = "mpi"
_INSTALL = "`pip install 'idist[mpi]' mpich` brings a whole MPI; without mpich it uses the one that is there."
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class Mpi(C10d):
    """A torch process group whose every operation is one of MPI, between processes that mpiexec has started."""

    launcher: ClassVar[str] = "mpiexec"

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return () if dist.is_mpi_available() or not dist.is_available() else (_NAME,)

    def __init__(self, name: str) -> None:
        super().__init__(name, adopted=True)
        self._by_device = {"cpu": name}

    def unavailable_reason(self) -> tuple[str, str] | None:
        _, problem = library.probe()
        return (problem, _INSTALL) if problem else None

    @classmethod
    def attach(cls) -> None:
        """A group that the user made is torch's, whatever moves its bytes."""
        return

    def start(
        self,
        topology: Topology,
        *,
        timeout: timedelta | None,
        device: torch.device | None,
        init_method: str | None = None,
        **options: Any,
    ) -> Topology:
        self._reject(options)
        mpi = library.load(topology, os.environ, timeout or DEFAULT_TIMEOUT)
        from idist.backends.mpi.group import NAME

        self._torch_name = NAME
        if topology.master_addr is None and init_method is None:
            host, token = library.told_by_rank_0(mpi, timeout or DEFAULT_TIMEOUT)
            topology = dataclasses.replace(topology, master_addr=host, job_token=token)
        topology = super().start(topology, timeout=timeout, device=device, init_method=init_method)
        library.abort_on_errors(mpi)
        library.forget_shared_memory()  # all ranks have met, and so have all that there is
        return topology

    def stop(self) -> None:
        super().stop()
        if self._torch_name != self.name:  # it has been started
            from idist.backends.mpi.work import stop_progress

            stop_progress()

    def begun(self) -> dict[str, int]:
        # A program may have groups of another library beside ours, as a checkpoint in the background has.
        groups: list[tuple[Any, str]] = list(dist.distributed_c10d._world.pg_names.items())
        return {name: group.begun if hasattr(group, "begun") else begun_in(group) for group, name in groups}

    def pending(self) -> list[Pending]:
        from idist.backends.mpi.work import pending

        return pending()

    def reduces(self, op: str, dtype: torch.dtype) -> bool:
        return dtype in _INTEGERS or (dtype in _FLOATS and op not in ("AND", "OR"))
