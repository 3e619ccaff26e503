"""Launches as data: the variables of every process, where it ran, and what has to be found.

``recorded/`` holds what real launchers set (torch 2.13, Slurm 22.05, MPICH 5.0.2, Open MPI 5.0.11);
names of machines are changed, and variables that say nothing about the launch are left out. In
each launch ``variables`` are those that all processes share. ``nodes`` is local rank, processes on
this node, node rank, number of nodes; null where the launcher does not tell. For torchrun ``host``
is the agent, since two agents on one host count as two nodes.

Below are the launches that were not recorded: their variables come from the launcher's source or
documentation.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "recorded"


@dataclasses.dataclass(frozen=True)
class Process:
    host: str
    variables: Mapping[str, str]
    environment: str = "serial"
    nodes: tuple[int, int, int, int] | None = None
    master_addr: str | None = None
    hint: tuple[str, ...] = ()
    error: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Launch:
    name: str
    processes: tuple[Process, ...]

    @property
    def fails(self) -> bool:
        return any(process.error for process in self.processes)


def recorded(file: str) -> Iterator[Launch]:
    for launch in json.loads((RECORDED / file).read_text()):
        yield Launch(launch["launch"], tuple(_process(launch["variables"], each) for each in launch["processes"]))


def _process(shared: dict[str, str], own: dict[str, Any]) -> Process:
    expected: dict[str, Any] = own["expected"]
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in expected.items()
    }
    return dataclasses.replace(Process(own["host"], {**shared, **own["variables"]}), **values)


def _horovod(rank: int, size: int, local: tuple[int, int], cross: tuple[int, int], host: str) -> dict[str, str]:
    return {
        "HOROVOD_RANK": str(rank),
        "HOROVOD_SIZE": str(size),
        "HOROVOD_LOCAL_RANK": str(local[0]),
        "HOROVOD_LOCAL_SIZE": str(local[1]),
        "HOROVOD_CROSS_RANK": str(cross[0]),
        "HOROVOD_CROSS_SIZE": str(cross[1]),
        "HOROVOD_HOSTNAME": host,
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": "41234",
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
    }


def _pytorchjob(rank: int, nnodes: str = "2", **more: str) -> dict[str, str]:
    """https://github.com/kubeflow/trainer/blob/release-1.9/pkg/controller.v1/pytorch/envvar.go."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "digits-master-0",
        "MASTER_PORT": "23456",
        "PET_NNODES": nnodes,
        "PET_NODE_RANK": str(rank),
        "PET_NPROC_PER_NODE": "1",
        "KUBERNETES_SERVICE_HOST": "10.96.0.1",
        **more,
    }


def _by_hand(rank: int, world_size: int, **more: str) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "node1", "MASTER_PORT": "29500", **more}


def _batch(**more: str) -> dict[str, str]:
    return {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", **more}


SLIP = ("inside Slurm job 12", "one process", "srun python")
WRITTEN = (
    Launch(
        "horovodrun -np 2 --gloo",
        tuple(
            Process("node1", _horovod(r, 2, (r, 2), (0, 1), "node1"), "horovod", nodes=(r, 2, 0, 1)) for r in range(2)
        ),
    ),
    Launch(
        "horovodrun -np 3 --gloo -H node1:1,node2:2",
        (
            Process("node1", _horovod(0, 3, (0, 1), (0, 2), "node1"), "horovod"),
            Process("node2", _horovod(1, 3, (0, 2), (1, 2), "node2"), "horovod"),
            Process("node2", _horovod(2, 3, (1, 2), (0, 1), "node2"), "horovod"),
        ),
    ),
    Launch(
        "horovodrun in a Slurm job, with MASTER_ADDR for another backend",
        tuple(
            Process(
                "node1",
                {**_horovod(r, 2, (r, 2), (0, 1), "node1"), **_batch(), "MASTER_ADDR": "node1"},
                "horovod",
                nodes=(r, 2, 0, 1),
                master_addr="node1",
            )
            for r in range(2)
        ),
    ),
    Launch(
        "a PyTorchJob of two pods that run python",
        tuple(
            Process(f"pod{r}", _pytorchjob(r), "kubeflow", nodes=(0, 1, r, 2), master_addr="digits-master-0")
            for r in range(2)
        ),
    ),
    Launch(
        "an elastic PyTorchJob with a master, pods run python",
        tuple(
            Process(f"pod{r}", _pytorchjob(r, nnodes="1:3"), "kubeflow", master_addr="digits-master-0")
            for r in range(2)
        ),
    ),
    Launch(
        "a PyTorchJob with nprocPerNode auto",
        tuple(
            Process(
                f"pod{r}",
                _pytorchjob(r, PET_NPROC_PER_NODE="auto"),
                "kubeflow",
                nodes=(0, 1, r, 2),
                master_addr="digits-master-0",
            )
            for r in range(2)
        ),
    ),
    Launch(
        "a PyTorchJob with nprocPerNode 4, pods run python",
        (
            Process(
                "pod1", _pytorchjob(1, WORLD_SIZE="8", PET_NPROC_PER_NODE="4"), error=("PET_NPROC_PER_NODE", "torchrun")
            ),
        ),
    ),
    Launch(
        "a pod of Kubeflow's Trainer 2 that runs python",
        (
            Process(
                "pod0",
                {
                    "PET_NNODES": "2",
                    "PET_NPROC_PER_NODE": "1",
                    "PET_NODE_RANK": "0",
                    "PET_MASTER_ADDR": "digits-node-0-0",
                    "PET_MASTER_PORT": "29500",
                },
                hint=("PET_NNODES", "torchrun"),
            ),
        ),
    ),
    Launch(
        "pods of an operator without PET variables",
        tuple(Process(f"pod{r}", _by_hand(r, 2), "envvars", master_addr="node1") for r in range(2)),
    ),
    Launch(
        "local ranks 0 1 0 on two nodes, set by hand",
        tuple(
            Process(host, _by_hand(r, 3, LOCAL_RANK=local), "envvars", master_addr="node1")
            for r, (host, local) in enumerate([("node1", "0"), ("node1", "1"), ("node2", "0")])
        ),
    ),
    Launch(
        "local ranks 0 1 0 on two nodes, and all that torchrun would set but its own names",
        tuple(
            Process(
                f"node{1 + node}",
                _by_hand(r, 3, LOCAL_RANK=str(local), LOCAL_WORLD_SIZE=str(size), NODE_RANK=str(node), NNODES="2"),
                "envvars",
                nodes=(local, size, node, 2),
                master_addr="node1",
            )
            for r, (local, size, node) in enumerate([(0, 2, 0), (1, 2, 0), (0, 1, 1)])
        ),
    ),
    Launch(
        "two processes of one node, set by hand",
        tuple(
            Process(
                "node1",
                _by_hand(r, 2, LOCAL_RANK=str(r), LOCAL_WORLD_SIZE="2"),
                "envvars",
                nodes=(r, 2, 0, 1),
                master_addr="node1",
            )
            for r in range(2)
        ),
    ),
    Launch("RANK=0 WORLD_SIZE=1", (Process("node1", {"RANK": "0", "WORLD_SIZE": "1"}, "envvars", nodes=(0, 1, 0, 1)),)),
    Launch(
        "a batch script of a Slurm that gives it a step id",
        (Process("node1", _batch(SLURM_STEP_ID="4294967291"), hint=(*SLIP, "batch script")),),
    ),
    Launch("ssh into a job (pam_slurm_adopt)", (Process("node1", _batch(SLURM_STEP_ID="4294967292"), hint=SLIP),)),
    Launch("a step id in words", (Process("node1", _batch(SLURM_STEP_ID="batch"), hint=SLIP),)),
    Launch("a batch script of one task: as asked, no hint", (Process("node1", _batch(SLURM_NTASKS="1")),)),
    Launch(
        "sbatch inside the one task of srun --pty bash, no srun",
        (
            Process(
                "node2",
                _batch(
                    SLURM_JOB_NODELIST="node2",
                    SLURMD_NODENAME="node2",
                    SLURM_LOCALID="0",
                    SLURM_NODEID="0",
                    SLURM_GTIDS="0",
                    SLURM_STEP_ID="0",
                    SLURM_STEP_NODELIST="node1",
                    SLURM_STEP_NUM_NODES="1",
                    SLURM_STEP_NUM_TASKS="1",
                    SLURM_STEP_TASKS_PER_NODE="1",
                ),
                hint=SLIP,
            ),
        ),
    ),
    Launch("plain python", (Process("node1", {"PATH": "/usr/bin", "HOME": "/home/me"}),)),
    Launch(
        "what is harmless alone",
        (
            Process(
                "node1",
                {
                    "MASTER_ADDR": "node1",
                    "MASTER_PORT": "29500",
                    "LOCAL_WORLD_SIZE": "4",
                    "NODE_RANK": "0",
                    "NNODES": "1",
                    "WORLD_SIZE": "1",
                    "PMI_RANK": "0",
                    "PMI_SIZE": "1",
                },
            ),
        ),
    ),
)

LAUNCHES = (*recorded("torchrun.json"), *recorded("mpi.json"), *recorded("slurm.json"), *WRITTEN)
PROCESSES = {
    f"{launch.name} [{index}]": process for launch in LAUNCHES for index, process in enumerate(launch.processes)
}


def launch(name: str) -> Launch:
    """The launch of that name."""
    (found,) = [each for each in LAUNCHES if each.name == name]
    return found
