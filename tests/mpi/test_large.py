"""More bytes, and more elements, than an int of C can count."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpi import mpiexec

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

HEAD = """
import torch
import torch.distributed as dist
idist.initialize("mpi", timeout=100)
rank, MANY = idist.get_rank(), 2**31 + 5
def marked(length):
    tensor = torch.zeros(length, dtype=torch.uint8)
    tensor[0], tensor[length // 2], tensor[-1] = 1 + rank, 3 + rank, 5 + rank
    return tensor
def marks(tensor):
    return [tensor[0].item(), tensor[tensor.numel() // 2].item(), tensor[-1].item(), int(tensor.count_nonzero())]
"""
CASES = {
    "broadcast": ("tensor = marked(MANY)\ndist.broadcast(tensor, 0)\nsaid = marks(tensor)", [[1, 3, 5, 3]] * 2),
    "all_reduce": ("tensor = marked(MANY)\ndist.all_reduce(tensor)\nsaid = marks(tensor)", [[3, 7, 11, 3]] * 2),
    "send and recv": (
        "tensor = marked(MANY)\ndist.recv(tensor, 0) if rank else dist.send(tensor, 1)\nsaid = marks(tensor)",
        [[1, 3, 5, 3]] * 2,
    ),
    "all_gather": (
        """
out = torch.empty(2 * MANY, dtype=torch.uint8)
dist.all_gather_single(out, marked(MANY))
said = marks(out[:MANY]) + marks(out[MANY:])
""",
        [[1, 3, 5, 3, 2, 4, 6, 3]] * 2,
    ),
    "all_to_all": (
        """
given = marked(MANY) if rank == 0 else torch.empty(0, dtype=torch.uint8)
out = torch.empty(MANY if rank == 1 else 0, dtype=torch.uint8)
dist.all_to_all_single(out, given, [MANY, 0] if rank else [0, 0], [0, 0] if rank else [0, MANY])
said = marks(out) if rank else out.numel()
""",
        [0, [1, 3, 5, 3]],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_arrives_whole(tmp_path: Path, case: str) -> None:
    script, expected = CASES[case]
    assert mpiexec.said(HEAD + script, 2, tmp_path) == expected
