"""torchrun and ``torch.distributed.launch``, which is torchrun under an older name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from idist.environments.base import Environment, Rejected, Variables
from idist.topology import Topology


class TorchElastic(Environment):
    """A worker of a torchrun agent, also where srun or a Kubernetes operator started the agent.

    A node is an agent: two agents on one host count as two nodes, as torchrun itself counts.

    Source: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
    """

    name: ClassVar[str] = "torchelastic"

    def detect(self, env: Mapping[str, str]) -> Topology | Rejected:
        if not env.get("TORCHELASTIC_RUN_ID"):
            return Rejected("TORCHELASTIC_RUN_ID is not set")
        told = Variables(self.name, env)
        run = told.text("TORCHELASTIC_RUN_ID")
        return Topology(
            self.name,
            rank=told.integer("RANK"),
            world_size=told.integer("WORLD_SIZE"),
            local_rank=told.integer("LOCAL_RANK"),
            nproc_per_node=told.integer("LOCAL_WORLD_SIZE"),
            node_rank=told.integer("GROUP_RANK"),
            nnodes=(agents := told.integer("GROUP_WORLD_SIZE")),
            master_addr=told.text("MASTER_ADDR"),
            master_port=told.integer("MASTER_PORT"),
            store_served=told.optional_text("TORCHELASTIC_USE_AGENT_STORE") == "True",
            job_token=f"torchelastic-{run}{self._attempt(told) if agents == 1 else ''}",
            evidence=told.evidence,
        )

    @staticmethod
    def _attempt(told: Variables) -> str:
        """Which attempt this is, where that is known.

        Every agent counts only the restarts that it spent on failures of its own workers, so after
        a restart the agents of one attempt may have different counts (seen: 1 where the worker had
        died, 0 on the other node). A token with the count in it would keep them apart.
        """
        return f"-{told.optional_integer('TORCHELASTIC_RESTART_COUNT') or 0}"
