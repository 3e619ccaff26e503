"""Pods of Kubeflow's PyTorchJob that run ``python`` themselves, one process each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from idist.environments.base import Environment, Rejected, Variables
from idist.errors import LaunchError
from idist.topology import Topology


class Kubeflow(Environment):
    """The one process of a pod of a PyTorchJob; a node is a pod.

    The operator sets RANK and WORLD_SIZE for such pods, and ``PET_*`` for pods that run torchrun.
    Older operators set no ``PET_*``: their pods are taken for plain variables.

    Source: https://github.com/kubeflow/trainer/blob/release-1.9/pkg/controller.v1/pytorch/envvar.go
    """

    name: ClassVar[str] = "kubeflow"

    def detect(self, env: Mapping[str, str]) -> Topology | Rejected:
        if not env.get("PET_NNODES"):
            return Rejected("PET_NNODES is not set")
        if env.get("LOCAL_RANK"):
            return Rejected("LOCAL_RANK is set, so something inside the pod started this process")
        if not (env.get("RANK") or env.get("WORLD_SIZE")):
            # Trainer 2, elastic jobs, and users who give torchrun its arguments this way.
            return Rejected("PET_NNODES without RANK is an argument of torchrun", self._hint(env))
        told = Variables(self.name, env)
        nodes, processes = told.text("PET_NNODES"), told.optional_text("PET_NPROC_PER_NODE") or "1"
        rank, world_size = told.integer("RANK"), told.integer("WORLD_SIZE")
        if processes.isdecimal() and processes != "1":  # "auto" means one per GPU, but WORLD_SIZE counts it as one
            raise LaunchError(
                f"kubeflow: PET_NPROC_PER_NODE={processes} wants {processes} processes in this pod, and RANK={rank} is "
                "the pod's, not a process's. Start them with `torchrun train.py`, or set nprocPerNode to 1 in the job."
            )
        topology = Topology(
            self.name,
            rank=rank,
            world_size=world_size,
            master_addr=told.text("MASTER_ADDR"),
            master_port=told.integer("MASTER_PORT"),
            evidence=told.evidence,
        )
        # An elastic job has a range here, 1:3, that tells nothing about this run of it.
        return self._one_per_pod(topology) if nodes == str(world_size) else topology

    @staticmethod
    def _one_per_pod(topology: Topology) -> Topology:
        return dataclasses.replace(
            topology, local_rank=0, nproc_per_node=1, node_rank=topology.rank, nnodes=topology.world_size
        )

    @staticmethod
    def _hint(env: Mapping[str, str]) -> str | None:
        if env.get("PET_NNODES") == "1" and env.get("PET_NPROC_PER_NODE", "1") == "1":
            return None
        return "PET_NNODES is set for torchrun, but this is not torchrun: running one process; use `torchrun train.py`"
