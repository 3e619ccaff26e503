"""scatter of tensors and of anything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import idist
from conformance.values import DTYPES, LAYOUTS, filled, last, of_all, raises, received, same, snapshot


def from_rank(source: int, values: Any) -> Any:
    return idist.scatter(values if idist.get_rank() == source else None, src=source)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_from_every_rank(dtype: torch.dtype) -> None:
    for source in range(idist.get_world_size()):
        given = of_all(filled, dtype, (2, 3))
        result = from_rank(source, given)
        same(result, received(filled(idist.get_rank(), dtype, (2, 3))))
        same(given, of_all(filled, dtype, (2, 3)))
        result.zero_()  # it is ours alone
        same(given, of_all(filled, dtype, (2, 3)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout: str) -> None:
    result = from_rank(last(), of_all(LAYOUTS[layout]))
    same(result, received(snapshot(LAYOUTS[layout](idist.get_rank()))))
    assert not result.requires_grad
    assert result.device.type == idist.device().type


VALUES: dict[str, Callable[[int], Any]] = {
    "ints": lambda rank: 2**62 + rank,
    "floats": lambda rank: 0.1 * rank,
    "strings": lambda rank: "é" * (rank * 200),
    "paths": lambda rank: Path("/tmp") / f"{rank}",
    "nothing": lambda rank: None,
    "objects of different sizes": lambda rank: {"rank": rank, "list": list(range(rank * 100))},
    "every rank another kind": lambda rank: [True, 1, 1.5, "é"][rank % 4],
    "large": lambda rank: "x" * (10**6 if rank == last() else 3),
}


@pytest.mark.parametrize("values", VALUES)
def test_values(values: str) -> None:
    for source in (0, last()):
        same(from_rank(source, of_all(VALUES[values])), VALUES[values](idist.get_rank()))
    same(from_rank(0, tuple(of_all(VALUES[values]))), VALUES[values](idist.get_rank()))


@pytest.mark.parametrize("ignored", [1, "a", [1, 2, 3, 4, 5], torch.zeros(3)], ids=lambda value: type(value).__name__)
def test_what_the_other_ranks_pass_is_ignored(ignored: Any) -> None:
    values = of_all(str)
    same(idist.scatter(values if idist.get_rank() == last() else ignored, src=last()), str(idist.get_rank()))


def refused(values: Any, *words: str) -> None:
    """The source raises, and the others, who wait for it, hear why."""
    if idist.get_rank() == last():
        with raises(idist.ConfigError, *words):
            idist.scatter(values, src=last())
    else:
        with raises(idist.PeerFailed, f"rank {last()}: ConfigError", *words):
            idist.scatter(None, src=last())


def test_wrong_number_of_values() -> None:
    refused([], "got 0 values")
    refused([1] * (idist.get_world_size() + 1), f"{idist.get_world_size()} values on rank {last()}")


@pytest.mark.parametrize("values", [None, 1, {0: 1}, {1}, torch.zeros(4)], ids=lambda value: type(value).__name__)
def test_no_sequence(values: Any) -> None:
    refused(values, "sequence", type(values).__name__)


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize("odd", [torch.zeros(3), torch.zeros(2, dtype=torch.int64), 1, None], ids=repr)
def test_tensors_that_differ(odd: Any) -> None:
    refused([*of_all(lambda rank: torch.zeros(2))[1:], odd], "one dtype and shape", "float32 2")


@pytest.mark.parametrize("source", [-1, 100, None, "0", 0.0, True], ids=repr)
def test_bad_source(source: Any) -> None:
    with raises(idist.ConfigError, "src", repr(source)):
        idist.scatter([1] * idist.get_world_size(), src=source)
