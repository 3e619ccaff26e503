"""Train examples/digits.py, started by srun or in NPROC processes started here, and tell which weights come out.

The example keeps its model to itself; here it is remembered when it is made.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path
from unittest import mock

import torch
from telling import FOLDER, tell

import idist

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))
import digits

NPROC = os.environ.get("NPROC")


def training(local_rank: int, config: argparse.Namespace) -> None:
    models = []
    cnn = digits.cnn
    digits.cnn = lambda: models.append(cnn()) or models[0]
    accuracy = digits.training(local_rank, config)
    digest = hashlib.sha256()
    for weights in models[0].state_dict().values():
        digest.update(weights.numpy().tobytes())
    tell(
        rank=idist.get_rank(),
        world_size=idist.get_world_size(),
        nnodes=idist.get_nnodes(),
        threads=torch.get_num_threads(),
        accuracy=accuracy,
        weights=digest.hexdigest(),
    )


if __name__ == "__main__":
    with mock.patch.object(sys, "argv", ["digits.py", "--epochs", "1", "--output", str(FOLDER / "digits.png")]):
        config = digits.arguments()
    with idist.Parallel(backend="gloo", nproc_per_node=int(NPROC) if NPROC else None, timeout=100) as parallel:
        parallel.run(training, config)
