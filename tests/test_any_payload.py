"""Whatever the ranks give: all of them get what was given, or all of them an error; and they stay in step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conformance.values import same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import idist
from idist.testing import run_threads

SIZE = 3

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**64), 2**64),
    st.floats(allow_nan=False),  # which is not equal to itself where it is in a container
    st.text(st.characters(codec=None), max_size=300),
    st.text(max_size=20).map(lambda text: Path("/", *text.replace("\0", "").split())),
    st.binary(max_size=300),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.tuples(inner, inner), st.dictionaries(st.text(), inner)),
    max_leaves=8,
)
# Often the same kind on all ranks, which chance alone would hardly give.
ALIKE = st.sampled_from([st.integers(-5, 2**63), st.floats(), st.text(max_size=300), st.booleans(), VALUES])
BY_RANK = st.one_of(
    st.lists(VALUES, min_size=SIZE, max_size=SIZE), ALIKE.flatmap(lambda s: st.lists(s, min_size=SIZE, max_size=SIZE))
)

DTYPES = (torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.complex64)
SHAPES = st.lists(st.integers(0, 3), max_size=3)
EXPECTED = (idist.CollectiveMismatch, idist.PeerFailed, idist.ConfigError, OverflowError)
EXAMPLES = settings(max_examples=60, deadline=None)


def on_ranks(fn: Callable[[int], Any]) -> list[Any]:
    """What it returned on every rank, or the type of what it raised; the ranks are in step after it."""

    def one() -> Any:
        rank = idist.get_rank()
        try:
            outcome = fn(rank)
        except Exception as error:
            outcome = type(error)
        assert idist.all_gather(rank) == list(range(SIZE))
        return outcome

    return run_threads(one, SIZE, timeout=20)


def failed(outcomes: list[Any]) -> bool:
    """Whether all did; that only some did is what must not be."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, type)]
    assert len(errors) in (0, SIZE), outcomes
    # Who gives what cannot be sent gets its own error, and the others hear of it.
    assert all(issubclass(error, EXPECTED) for error in errors)
    return bool(errors)


@EXAMPLES
@given(BY_RANK)
def test_all_gather_of_anything(values: list[Any]) -> None:
    outcomes = on_ranks(lambda rank: idist.all_gather(values[rank]))
    kinds = {type(value) if isinstance(value, (bool, int, float, str, Path)) else object for value in values}
    large = any(type(value) is int and not -(2**63) <= value < 2**63 for value in values)
    if failed(outcomes):
        assert len(kinds) > 1 or large
    else:
        for outcome in outcomes:
            same(outcome, values)


@EXAMPLES
@given(VALUES, VALUES, st.integers(0, SIZE - 1))
def test_broadcast_of_anything(value: Any, other: Any, src: int) -> None:
    outcomes = on_ranks(lambda rank: idist.broadcast(value if rank == src else other, src=src, safe_mode=True))
    if failed(outcomes):
        assert type(value) is int
        assert not -(2**63) <= value < 2**63
    else:
        for outcome in outcomes:
            same(outcome, value)


@st.composite
def tensors(draw: st.DrawFn) -> list[Tensor]:
    """One for each rank: alike, or different in the first dimension, in all, or in their dtypes."""
    shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
    found = []
    for _ in range(SIZE):
        own = draw(st.sampled_from([shape, shape, [draw(st.integers(0, 4)), *shape[1:]], draw(SHAPES)]))
        kind = draw(st.sampled_from([dtype, dtype, dtype, draw(st.sampled_from(DTYPES))]))
        found.append(torch.arange(torch.Size(own).numel()).reshape(own).to(kind))
    return found


@EXAMPLES
@given(tensors(), st.booleans())
def test_all_gather_of_any_tensors(values: list[Tensor], uneven: bool) -> None:
    outcomes = on_ranks(lambda rank: idist.all_gather(values[rank], uneven=uneven))
    alike = len({value.dtype for value in values}) == 1 and len({value.dim() for value in values}) == 1
    alike = alike and len({value.shape[1:] if uneven else value.shape for value in values}) == 1
    alike = alike and not (uneven and values[0].dim() == 0)  # which has no first dimension
    assert failed(outcomes) != alike
    if alike:
        expected = torch.stack(values) if values[0].dim() == 0 else torch.cat(values)
        for outcome in outcomes:
            assert outcome.dtype == expected.dtype
            assert torch.equal(outcome, expected)


@EXAMPLES
@given(tensors())
def test_broadcast_of_any_tensor(values: list[Tensor]) -> None:
    for outcome in on_ranks(lambda rank: idist.broadcast(values[rank], src=1, safe_mode=True)):
        assert outcome.dtype == values[1].dtype
        assert torch.equal(outcome, values[1])


@EXAMPLES
@given(tensors(), st.sampled_from(["SUM", "PRODUCT", "MIN", "MAX", "AVERAGE"]))
def test_all_reduce_of_any_tensors(values: list[Tensor], op: str) -> None:
    outcomes = on_ranks(lambda rank: idist.all_reduce(values[rank], op))
    errors = [outcome for outcome in outcomes if isinstance(outcome, type)]
    assert len(errors) in (0, SIZE), outcomes
    if not errors:
        assert len({value.dtype for value in values}) == len({value.shape for value in values}) == 1
        assert all(torch.equal(outcome, outcomes[0]) for outcome in outcomes)
        if op == "SUM":
            assert torch.equal(outcomes[0], sum(values[1:], values[0]))
