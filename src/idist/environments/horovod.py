"""horovodrun with Gloo. With MPI it runs mpirun, which is recognised as such."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from idist.environments.base import Environment, Rejected, Variables, on_one_node
from idist.topology import Topology


class Horovod(Environment):
    """A process of ``horovodrun --gloo``, or of Horovod on Ray or Spark.

    Its cross rank is no node rank: it counts only the hosts that have a process with the same
    local rank. Hosts with 1 and 2 processes give the last one local rank 1 and cross size 1. No
    process can tell that from its own variables, so unless all are on one host the node fields are
    left to an exchange of the hosts, as horovodrun was told them, on all ranks alike.

    Source: https://horovod.readthedocs.io/en/stable/api.html#horovod.torch.cross_rank
    """

    name: ClassVar[str] = "horovod"

    def detect(self, env: Mapping[str, str]) -> Topology | Rejected:
        if not (env.get("HOROVOD_RANK") or env.get("HOROVOD_SIZE")):
            return Rejected("HOROVOD_RANK is not set")
        told = Variables(self.name, env)
        rank, world_size = told.integer("HOROVOD_RANK"), told.integer("HOROVOD_SIZE")
        local_rank, local_size = told.integer("HOROVOD_LOCAL_RANK"), told.integer("HOROVOD_LOCAL_SIZE")
        topology = Topology(
            self.name,
            rank=rank,
            world_size=world_size,
            node=told.optional_text("HOROVOD_HOSTNAME"),
            master_addr=told.optional_text("MASTER_ADDR"),
            master_port=told.optional_integer("MASTER_PORT"),
            job_token=self._job_token(told),
            evidence=told.evidence,
        )
        return on_one_node(topology, local_rank) if local_size == world_size else topology

    @staticmethod
    def _job_token(told: Variables) -> str | None:
        """The address of horovodrun's own server: no other job has it at the same time."""
        host = told.optional_text("HOROVOD_GLOO_RENDEZVOUS_ADDR")
        port = told.optional_text("HOROVOD_GLOO_RENDEZVOUS_PORT")
        return f"horovod-{host}-{port}" if host and port else None
