"""RANK and WORLD_SIZE, set by hand, by a launcher that we do not know, or by a Kubernetes operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from idist.environments.base import Environment, Rejected, Variables, on_one_node
from idist.topology import Topology


class EnvVars(Environment):
    """The variables that torch's ``env://`` reads.

    What is half set: RANK, LOCAL_RANK or a WORLD_SIZE of several processes without the others. Each
    says that somebody starts more than one process, or at least which one this is.

    What is harmless alone, as users and images export it for torchrun's command line or leave it
    behind: MASTER_ADDR and MASTER_PORT (where to meet, not whether), LOCAL_WORLD_SIZE, NODE_RANK,
    NNODES, and WORLD_SIZE=1, which one process fulfils.

    Source: https://docs.pytorch.org/docs/stable/distributed.html#environment-variable-initialization
    """

    name: ClassVar[str] = "envvars"

    def detect(self, env: Mapping[str, str]) -> Topology | Rejected:
        told = Variables(self.name, env)
        if not (env.get("RANK") or env.get("LOCAL_RANK")):
            if not env.get("WORLD_SIZE"):
                return Rejected("neither RANK nor WORLD_SIZE is set")
            if told.integer("WORLD_SIZE") == 1:
                return Rejected("WORLD_SIZE=1 without RANK is one process")
        told.optional_integer("LOCAL_RANK")  # first, as a witness if another one is missing
        told.optional_integer("WORLD_SIZE")
        rank, world_size = told.integer("RANK"), told.integer("WORLD_SIZE")
        alone = world_size == 1
        topology = Topology(
            self.name,
            rank=rank,
            world_size=world_size,
            master_addr=told.optional_text("MASTER_ADDR") if alone else told.text("MASTER_ADDR"),
            master_port=told.optional_integer("MASTER_PORT") if alone else told.integer("MASTER_PORT"),
            evidence=told.evidence,
        )
        placed = self._placed(topology, told, env)
        return dataclasses.replace(placed, evidence=told.evidence)

    @staticmethod
    def _placed(topology: Topology, told: Variables, env: Mapping[str, str]) -> Topology:
        """With the node fields where the variables determine them; a local rank alone never does.

        The names are torchrun's, and those that users give to the same things.
        """
        local_rank = told.optional_integer("LOCAL_RANK")
        if topology.world_size == 1:
            return on_one_node(topology, local_rank or 0)
        if local_rank is None:
            return topology
        local_size = told.optional_integer("LOCAL_WORLD_SIZE")
        node_rank = told.optional_integer("GROUP_RANK" if env.get("GROUP_RANK") else "NODE_RANK")
        nodes = "GROUP_WORLD_SIZE" if env.get("GROUP_WORLD_SIZE") else "NNODES"
        # For torchrun's command line NNODES may be a range, 1:4.
        nnodes = told.integer(nodes) if env.get(nodes, "").isdecimal() else None
        if local_size == topology.world_size or nnodes == 1:
            local_size, node_rank, nnodes = local_size or topology.world_size, node_rank or 0, nnodes or 1
        if local_size is None or node_rank is None or nnodes is None:
            return topology
        return dataclasses.replace(
            topology, local_rank=local_rank, nproc_per_node=local_size, node_rank=node_rank, nnodes=nnodes
        )
