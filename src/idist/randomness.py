"""Random numbers: the same on all ranks where they must be, others on each where they should be."""

from __future__ import annotations

import hashlib
import random
import sys

import torch

from idist.errors import ConfigError
from idist.runtime import current

__all__ = ["seed_all"]


def seed_all(seed: int, *, per_rank: bool = False) -> None:
    """Seed the generators of Python, NumPy (if imported) and torch, on all its devices.

    ::

        idist.seed_all(1)                   # models are made alike on all ranks
        model = idist.auto_model(Net())
        idist.seed_all(1, per_rank=True)    # dropout and augmentation differ from rank to rank

    The workers of a DataLoader draw their seeds from torch's generator, so after the second call they differ by rank
    and worker, and so do NumPy's and Python's generators in them.

    Args:
        seed: from 0 to 2**63 - 1.
        per_rank: make it another one on each rank.

    Raises:
        ConfigError: not such a number.

    Cost: none; ranks that pass different seeds get different numbers.
    """
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ConfigError(f"seed must be an integer from 0 to 2**63 - 1, got {seed!r}")
    if per_rank:
        # Not seed + rank, which another seed has on another rank.
        digest = hashlib.sha256(f"{seed} on rank {current().rank}".encode()).digest()
        seed = int.from_bytes(digest[:8], "big") >> 1
    random.seed(seed)
    torch.manual_seed(seed)
    current().backend.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed([seed & 0xFFFFFFFF, seed >> 32])
