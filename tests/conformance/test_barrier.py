"""barrier."""

from __future__ import annotations

import time

import pytest

import idist
from conformance.values import last


@pytest.mark.parametrize("late", ["first", "last"])
def test_nobody_leaves_before_all_have_come(late: str) -> None:
    if idist.get_rank() == (0 if late == "first" else last()):
        time.sleep(0.1)
    came = time.monotonic()
    idist.barrier()
    left = time.monotonic()
    assert max(idist.all_gather(came)) <= min(idist.all_gather(left))


def test_returns_nothing_as_often_as_it_is_called() -> None:
    assert [idist.barrier() for _ in range(20)] == [None] * 20  # type: ignore[func-returns-value]
