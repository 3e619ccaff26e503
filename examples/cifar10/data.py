"""CIFAR-10 as its authors publish it, and a small set in its place where that is not at hand."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

CLASSES = 10
SHAPE = (3, 32, 32)
"""Of an image: the red, the green and the blue plane, 32 rows of 32 pixels each, a byte a pixel."""

_IN_A_FILE = 10_000
_RECORD = 1 + 3 * 32 * 32
_SOURCE = "the binary version of https://www.cs.toronto.edu/~kriz/cifar.html"

Sample = tuple[Tensor, Tensor]


class Images(Dataset[Sample]):
    """Images and their labels.

    Args:
        records: a label and the bytes of an image each. Shape: ``(count, 3073)``, of uint8.
    """

    def __init__(self, records: Tensor) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        """Shape: ``(3, 32, 32)`` of uint8, and ``()`` of int64."""
        record = self._records[index]
        return record[1:].view(SHAPE), record[0].long()


def cifar10(folder: Path) -> tuple[Dataset[Sample], Dataset[Sample]]:
    """The 50,000 images to train with and the 10,000 to test with; only those that are looked at are read.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is broken. Says which, what was found there, and what was expected.
    """
    training = [_read(folder / f"data_batch_{number}.bin") for number in range(1, 6)]
    return ConcatDataset(training), _read(folder / "test_batch.bin")


def _read(path: Path) -> Images:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected the files of {_SOURCE}")
    size = path.stat().st_size
    if size != _IN_A_FILE * _RECORD:
        raise ValueError(
            f"{path} is broken: found {size:,} bytes, expected {_IN_A_FILE * _RECORD:,}, which are {_IN_A_FILE:,} "
            f"records of {_RECORD:,}. Take it once more from {_SOURCE}"
        )
    records = torch.from_file(str(path), size=size, dtype=torch.uint8).view(_IN_A_FILE, _RECORD)
    wrong = (records[:, 0] >= CLASSES).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"{path} is broken: found label {int(records[first, 0])} in record {first}, expected one from 0 to "
            f"{CLASSES - 1} in each ({len(wrong):,} are wrong). Take it once more from {_SOURCE}"
        )
    return Images(records)


def generated(count: int, seed: int) -> Images:
    """Images in the same format, of a coarse pattern for each class under much noise."""
    coarse = torch.rand(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    patterns = nn.functional.interpolate(coarse, SHAPE[1:], mode="bilinear")
    labels = torch.arange(count) % CLASSES
    noise = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    pixels = (patterns[labels] + noise) * 127.5
    return Images(torch.cat([labels.unsqueeze(1), pixels.flatten(1)], dim=1).to(torch.uint8))
