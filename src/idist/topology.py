"""Where this process stands in the job: a frozen value, made by an environment or a launcher."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from idist.errors import LaunchError

UNKNOWN = -1
"""A node field that the environment does not tell; :meth:`Topology.place` fills it in."""


@dataclasses.dataclass(frozen=True, slots=True)
class Topology:
    """The place of one process among the processes of its job.

    The four node fields are either all known or all ``UNKNOWN``: some environments give a
    rank and a world size but say nothing about the nodes.

    Attributes:
        environment: who said so: ``torchelastic``, ``slurm``, ..., ``serial``.
        rank: index of this process in the job.
        world_size: number of processes of the job.
        local_rank: index of this process on its node.
        nproc_per_node: number of processes of the job on THIS node; other nodes may have more or fewer.
        node_rank: index of this node in the job.
        nnodes: number of nodes of the job.
        node: what the launcher calls this node, where that, and not the host name, tells nodes apart.
        master_addr: host where rank 0 can be reached, if the environment tells.
        hosts: where that is not told or not sure: the nodes of the job, rank 0 being on one of them.
        master_port: port of the rendezvous there, if the environment tells.
        store_served: whether a store listens there already (torchrun's agent, the process that
            spawned us); otherwise rank 0 has to serve it.
        job_token: proves that two processes belong to one job, and to one attempt at it.
        evidence: the variables that were believed, as ``NAME=value``.
    """

    environment: str
    rank: int
    world_size: int
    local_rank: int = UNKNOWN
    nproc_per_node: int = UNKNOWN
    node_rank: int = UNKNOWN
    nnodes: int = UNKNOWN
    node: str | None = None
    master_addr: str | None = None
    hosts: tuple[str, ...] = ()
    master_port: int | None = None
    store_served: bool = False
    job_token: str | None = None
    evidence: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check("rank", self.rank, self.world_size)
        if self.placed:
            self._check("local rank", self.local_rank, self.nproc_per_node)
            self._check("node rank", self.node_rank, self.nnodes)
            if self.nproc_per_node > self.world_size:
                raise self._contradiction(
                    f"{self.nproc_per_node} processes on this node are more than world size {self.world_size}"
                )
            if self.nnodes > self.world_size:
                raise self._contradiction(f"{self.nnodes} nodes are more than world size {self.world_size}")
            elsewhere = self.world_size - self.nproc_per_node
            if elsewhere < self.nnodes - 1 or (elsewhere and self.nnodes == 1):
                raise self._contradiction(
                    f"{self.nproc_per_node} processes on this node leave {elsewhere} of world size {self.world_size} "
                    f"for {self.nnodes - 1} other nodes"
                )
        elif (self.nproc_per_node, self.node_rank, self.nnodes) != (UNKNOWN,) * 3:
            raise self._contradiction("some of the node fields are known and some are not")
        if self.master_port is not None and not 0 <= self.master_port < 2**16:
            raise self._contradiction(f"master port {self.master_port} is not between 0 and 65535")

    @property
    def placed(self) -> bool:
        """Whether the four node fields are known."""
        return self.local_rank != UNKNOWN

    def place(self, hosts: Sequence[str]) -> Topology:
        """The same topology with its node fields derived from the host of every rank.

        Nodes are numbered in the order of their lowest rank; local ranks follow the ranks.

        Args:
            hosts: one name per rank, equal for two ranks exactly if they share a node.
        """
        if len(hosts) != self.world_size:
            raise self._contradiction(f"{len(hosts)} hosts were given for world size {self.world_size}")
        fields: dict[str, Any] = dict(places(hosts)[self.rank])
        return dataclasses.replace(self, **fields)

    def _check(self, what: str, index: int, size: int) -> None:
        if size < 1 or not 0 <= index < size:
            raise self._contradiction(f"{what} {index} is not in the range of {size}")

    def _contradiction(self, problem: str) -> LaunchError:
        evidence = ", ".join(self.evidence) or "none"
        return LaunchError(
            f"{self.environment}: {problem}. Variables believed: {evidence}. "
            "Check how the job was started; `idist check` shows what was detected."
        )


SERIAL = Topology("serial", rank=0, world_size=1, local_rank=0, nproc_per_node=1, node_rank=0, nnodes=1)
"""One process on its own."""


def places(hosts: Sequence[str]) -> list[dict[str, int]]:
    """The node fields of every rank; see :meth:`Topology.place`. Takes time in proportion to the number of ranks."""
    nodes = {host: index for index, host in enumerate(dict.fromkeys(hosts))}
    sizes = Counter(hosts)
    seen: Counter[str] = Counter()
    found = []
    for host in hosts:
        found.append(
            {
                "local_rank": seen[host],
                "nproc_per_node": sizes[host],
                "node_rank": nodes[host],
                "nnodes": len(nodes),
            }
        )
        seen[host] += 1
    return found
