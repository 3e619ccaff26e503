"""mpiexec and mpirun of Open MPI and of Hydra, the launcher of MPICH and Intel MPI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from idist.environments.base import Environment, Rejected, Variables, on_one_node
from idist.errors import LaunchError
from idist.topology import Topology

_OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")


class Mpi(Environment):
    """A process of mpiexec, also inside a Slurm job, where its helpers are tasks of a step.

    Neither launcher tells the number of nodes (``OMPI_COMM_WORLD_NODE_RANK`` is one more rank
    WITHIN the node, across jobs). So the node fields are known only where all processes are on
    this node. Open MPI's local ranks need not follow the ranks.

    Source: https://docs.open-mpi.org/en/main/tuning-apps/environment-var.html and
    https://github.com/pmodels/mpich/blob/main/doc/wiki/how_to/Using_the_Hydra_Process_Manager.md
    """

    name: ClassVar[str] = "mpi"

    def detect(self, env: Mapping[str, str]) -> Topology | Rejected:
        told = Variables(self.name, env)
        if any(env.get(name) for name in _OPEN_MPI):
            rank, world_size = told.integer("OMPI_COMM_WORLD_RANK"), told.integer("OMPI_COMM_WORLD_SIZE")
            local_rank = told.integer("OMPI_COMM_WORLD_LOCAL_RANK")
            local_size = told.optional_integer("OMPI_COMM_WORLD_LOCAL_SIZE")
            job = told.optional_text("PMIX_NAMESPACE")
        elif env.get("MPI_LOCALRANKID"):
            local_rank = told.integer("MPI_LOCALRANKID")
            rank, world_size = told.integer("PMI_RANK"), told.integer("PMI_SIZE")
            local_size = told.optional_integer("MPI_LOCALNRANKS")
            job = told.optional_text("PMI_JOBID")
        else:
            return self._reject(env, told)
        topology = Topology(
            self.name,
            rank=rank,
            world_size=world_size,
            master_addr=told.optional_text("MASTER_ADDR"),
            master_port=told.optional_integer("MASTER_PORT"),
            job_token=f"mpi-{job}" if job else None,
            evidence=told.evidence,
        )
        return on_one_node(topology, local_rank) if world_size in (1, local_size) else topology

    @staticmethod
    def _reject(env: Mapping[str, str], told: Variables) -> Rejected:
        """PMI_RANK is set by srun too (``--mpi=pmi2``): then, or with RANK, others know better.

        Alone, with more than one process, it is a launcher that we do not know, for example
        MPICH's gforker: as many worlds of one would start, silently.
        """
        if not (env.get("PMI_RANK") and env.get("PMI_SIZE")):
            return Rejected("neither OMPI_COMM_WORLD_RANK nor MPI_LOCALRANKID is set")
        if not (env.get("SLURM_PROCID") or env.get("RANK")) and told.integer("PMI_SIZE") > 1:
            rank = told.text("PMI_RANK")
            raise LaunchError(
                f"mpi: MPI_LOCALRANKID is not set, though PMI_RANK={rank} and PMI_SIZE={env['PMI_SIZE']} are: this MPI "
                "launcher is not known. Start with mpiexec of MPICH, Intel MPI or Open MPI, or set RANK, WORLD_SIZE, "
                "LOCAL_RANK, MASTER_ADDR and MASTER_PORT for every process. To run as one process, unset PMI_RANK."
            )
        return Rejected("PMI_RANK without MPI_LOCALRANKID, as srun sets it too, tells nothing")
