"""How a task tells the test what it saw: a file of its own, in the folder that is its first argument."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import idist
from idist.runtime import current

FOLDER = Path(sys.argv[1])


def tell(**facts: Any) -> None:
    """Say it whole or not at all; a second time takes the place of the first."""
    whose = {"host": socket.gethostname(), "job": os.environ.get("SLURM_JOB_ID"), "pid": os.getpid()}
    path = FOLDER / "{host}-{job}-{pid}".format(**whose)
    path.write_text(json.dumps(whose | facts))
    path.rename(path.with_suffix(".json"))


def place() -> dict[str, Any]:
    """Where idist says this process is, and whom it met there."""
    return {
        "rank": idist.get_rank(),
        "world_size": idist.get_world_size(),
        "local_rank": idist.get_local_rank(),
        "nproc_per_node": idist.get_nproc_per_node(),
        "node_rank": idist.get_node_rank(),
        "nnodes": idist.get_nnodes(),
        "topology": dataclasses.asdict(current().topology),
        "ranks": idist.all_gather(torch.tensor(idist.get_rank())).tolist(),
        "hosts": idist.all_gather(idist.hostname()),
        "jobs": idist.all_gather(f"{os.environ.get('SLURM_JOB_ID')}.{os.environ.get('SLURM_STEP_ID')}"),
        "total": idist.all_reduce(2 ** idist.get_rank()),
        "port": store_port(),
    }


def store_port() -> int | None:
    """Where the ranks of this job met."""
    store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store.port if isinstance(store, dist.TCPStore) else None
