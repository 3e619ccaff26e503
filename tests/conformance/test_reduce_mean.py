"""reduce_mean: over samples, not over ranks; integers exactly."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

import idist
from conformance.values import raises


def test_ranks_have_different_numbers_of_samples() -> None:
    rank, size = idist.get_rank(), idist.get_world_size()
    counts = [3 * i for i in range(size)]
    counts[-1] += 2
    rights = [count // 2 + 1 for count in counts]
    wanted = float(Fraction(sum(rights), sum(counts)))
    assert idist.reduce_mean(rights[rank], counts[rank]) == wanted
    mean = idist.reduce_mean(torch.tensor([rights[rank], 0]), counts[rank])
    assert mean.dtype == torch.float64
    assert mean.tolist() == [wanted, 0.0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float32])
def test_sums_do_not_overflow_or_round(dtype: torch.dtype) -> None:
    size = idist.get_world_size()
    mean = idist.reduce_mean(torch.ones(3, dtype=dtype), 1)
    assert mean.tolist() == [1.0] * 3
    big = idist.reduce_mean(2**53 + 1, 2**53 + 1)
    assert big == 1.0
    assert idist.reduce_mean(0.1, 1) == sum([0.1] * size) / size


def test_a_rank_without_samples() -> None:
    first = idist.get_rank() == 0
    assert idist.reduce_mean(5 if first else 0, 2 if first else 0) == 2.5
    with raises(ZeroDivisionError, "the mean of no samples"):
        idist.reduce_mean(0, 0)


@pytest.mark.parametrize("wrong", [1.0, True, None, "3"])
def test_a_count_is_an_integer(wrong: Any) -> None:
    with raises(TypeError, "count must be the number of this rank's samples", repr(wrong)):
        idist.reduce_mean(1, wrong)
