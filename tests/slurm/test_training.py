"""A whole training run on four nodes."""

from __future__ import annotations

from pathlib import Path

import pytest

from slurm.cluster import python, succeed, told

pytestmark = pytest.mark.slurm


def test_four_nodes_train_the_digits_to_the_weights_of_one(tmp_path: Path) -> None:
    """Eight processes either way: bit for bit the same."""
    folders = {nodes: tmp_path / f"on {nodes}" for nodes in (1, 4)}
    for folder in folders.values():
        folder.mkdir()
    succeed("srun", "-N4", "--ntasks-per-node=2", *python("weights.py", folders[4]))
    succeed(*python("weights.py", folders[1]), env={"NPROC": "8"})
    for nodes, folder in folders.items():
        said = told(folder)
        assert [each["rank"] for each in said] == list(range(8))
        assert {(each["world_size"], each["nnodes"], each["threads"]) for each in said} == {(8, nodes, 1)}
        assert (folder / "digits.png").stat().st_size > 0
    both = [each for folder in folders.values() for each in told(folder)]
    assert len({each["weights"] for each in both}) == 1
    (accuracy,) = {each["accuracy"] for each in both}
    assert accuracy > 0.9, "nothing was learnt, and equal weights show little"
