"""seed_all: alike or different, from rank to rank and worker to worker."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from processes import LOOPBACK, free_port, run_ranks
from torch.utils.data import DataLoader, Dataset

import idist


class Augmented(Dataset[tuple[float, float, float]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[float, float, float]:
        return draw()


def draw() -> tuple[float, float, float]:
    return random.random(), float(numpy.random.rand()), torch.rand(1, dtype=torch.float64).item()


@pytest.fixture(autouse=True)
def keeps_the_generators() -> Any:
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    numpy.random.set_state(states[1])
    torch.set_rng_state(states[2])


def on_rank(rank: int) -> dict[str, Any]:
    idist.initialize("gloo", rank=rank, world_size=2, timeout=30)
    said: dict[str, Any] = {}
    idist.seed_all(5)
    said["alike"] = draw(), torch.nn.Linear(2, 2).weight.tolist()
    idist.seed_all(5, per_rank=True)
    said["different"] = draw()
    for workers in (0, 2):
        loader = DataLoader(Augmented(), batch_size=None, num_workers=workers)
        said[f"{workers} workers"] = [tuple(item) for item in loader]
    idist.finalize()
    return said


def test_over_ranks_and_workers() -> None:
    where = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": free_port()}
    first, second = run_ranks(on_rank, 2, env=lambda rank: where, timeout=60)
    assert first.pop("alike") == second.pop("alike")
    drawn = [first["different"], second["different"]]
    for workers in ("0 workers", "2 workers"):
        drawn += first[workers] + second[workers]
    for generator in zip(*drawn, strict=True):
        assert len(set(generator)) == len(drawn), "a number came twice"


def test_again_the_same() -> None:
    idist.seed_all(2**63 - 1)
    first = draw()
    idist.seed_all(2**63 - 1)
    assert draw() == first
    idist.seed_all(0)
    assert draw() != first


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True, "1", None])
def test_not_a_seed(seed: Any) -> None:
    with pytest.raises(idist.ConfigError, match="seed must be an integer from 0 to"):
        idist.seed_all(seed)
