"""Numbers: each comes back with its own type and value, from every collective."""

from __future__ import annotations

import importlib.util
import math
import operator
from collections.abc import Callable
from functools import reduce
from itertools import product
from typing import Any

import pytest

import idist
from conformance.values import OPS, last, of_all, raises, same

NUMBERS = [
    0, 1, -1, 2**24 + 1, 2**53 + 1, 2**63 - 1, -(2**63),
    0.0, -0.0, 0.1, 1 / 3, 1e300, -1e-308, 5e-324, math.inf, -math.inf, math.nan,
    True, False,
]  # fmt: skip
TOO_LARGE = [2**63, -(2**63) - 1, 10**30]

needs_numpy = pytest.mark.skipif(importlib.util.find_spec("numpy") is None, reason="NumPy is not installed")


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_broadcast(number: Any) -> None:
    """KNOWN-FAILURES 4: 16777217 became 16777216.0, 0.1 became 0.10000000149, 1e300 inf and True 1.0."""
    source = last()
    mine = number if idist.get_rank() == source else type(number)(0)
    same(idist.broadcast(mine, src=source), number)
    same(idist.broadcast(number if idist.get_rank() == 0 else None), number)


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_gathered_and_scattered(number: Any) -> None:
    size = idist.get_world_size()
    same(idist.all_gather(number), [number] * size)
    same(idist.gather(number, dst=last()), [number] * size if idist.get_rank() == last() else None)
    same(idist.scatter([number] * size, src=last()), number)


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_reduced_to_itself(number: Any) -> None:
    for op in ("MIN", "MAX"):
        same(idist.all_reduce(number, op), number)


@pytest.mark.parametrize("op", ["SUM", "PRODUCT", "MIN", "MAX", "AND", "OR"])
@pytest.mark.parametrize("base", [0, 5, 2**53 + 1, 2**63 - 5, -(2**63)])
def test_ints_are_exact(op: str, base: int) -> None:
    """Python's own arithmetic: a result may be larger than 64 bits."""
    same(idist.all_reduce(base + idist.get_rank(), op), reduce(STEPS[op], of_all(lambda rank: base + rank)))


@pytest.mark.parametrize("op", ["SUM", "PRODUCT", "MIN", "MAX"])
@pytest.mark.parametrize("base", [0.1, -0.1, 1e300, 1e-310])
def test_floats_are_doubles_reduced_in_the_order_of_the_ranks(op: str, base: float) -> None:
    same(idist.all_reduce(base * (idist.get_rank() + 1), op), reduce(STEPS[op], of_all(lambda r: base * (r + 1))))


def test_floats_have_the_same_bits_on_all_ranks() -> None:
    total = idist.all_reduce(0.1 * 10.0 ** -idist.get_rank())
    assert set(idist.all_gather(total.hex())) == {total.hex()}


@pytest.mark.parametrize("op", ["SUM", "PRODUCT", "MIN", "MAX", "AND", "OR"])
def test_bools_stay_bools(op: str) -> None:
    """As torch does: they add as OR, and multiply as AND."""
    for first, others in product([False, True], repeat=2):
        values = [first, *[others] * last()]
        result = idist.all_reduce(values[idist.get_rank()], op)
        same(result, any(values) if op in ("SUM", "MAX", "OR") else all(values))


@pytest.mark.parametrize("value", [3, 2**53 + 1, 0.5])
def test_average(value: float) -> None:
    same(idist.all_reduce(value, "AVERAGE"), float(value))
    total = sum(of_all(float))
    same(idist.all_reduce(idist.get_rank(), "AVERAGE"), total / idist.get_world_size())
    same(idist.all_reduce(float(idist.get_rank()), "AVERAGE"), total / idist.get_world_size())


@pytest.mark.parametrize("op", ["SUM", "PRODUCT", "MIN", "MAX", "AVERAGE"])
def test_not_a_number_wherever_it_is(op: str) -> None:
    same(idist.all_reduce(math.nan if idist.get_rank() == last() else 1.0, op), math.nan)


def test_minus_zero_and_infinity() -> None:
    same(idist.all_reduce(-0.0), -0.0)
    same(idist.all_reduce(-0.0, "AVERAGE"), -0.0)
    same(idist.all_reduce(math.inf), math.inf)
    same(idist.all_reduce(-math.inf, "AVERAGE"), -math.inf)


@pytest.mark.parametrize(("value", "op"), [(1.5, "AND"), (1.5, "OR"), (True, "AVERAGE")])
def test_an_op_that_the_type_does_not_have_is_refused(value: Any, op: str) -> None:
    with raises(idist.ConfigError, op):
        idist.all_reduce(value, op)


@pytest.mark.parametrize("value", [1, 1.5, True])
@pytest.mark.parametrize("op", ["sum", "AVG", "", None])
def test_unknown_op(value: Any, op: Any) -> None:
    with raises(idist.ConfigError, repr(op), "SUM, PRODUCT, MIN, MAX, AND, OR, AVERAGE"):
        idist.all_reduce(value, op)


@pytest.mark.parametrize("value", ["1", None, [1], {}, 1j, b"1", print], ids=repr)
def test_only_numbers_are_reduced(value: Any) -> None:
    for op in OPS:
        with raises(TypeError, type(value).__name__):
            idist.all_reduce(value, op)


@pytest.mark.parametrize("number", TOO_LARGE)
def test_more_than_64_bits_is_an_error_on_every_rank(number: int) -> None:
    for call in EVERY_CALL:
        with raises(OverflowError, "64 bits", str(number)):
            call(number)


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize("number", TOO_LARGE)
@pytest.mark.parametrize("culprit", ["first", "last"])
def test_more_than_64_bits_on_one_rank_is_an_error_on_every_rank(number: int, culprit: str) -> None:
    bad = 0 if culprit == "first" else last()
    for call in EVERY_CALL:
        if idist.get_rank() == bad:
            with raises(OverflowError, "64 bits", str(number)):
                call(number)
        else:
            with raises(idist.PeerFailed, f"rank {bad}: OverflowError", str(number)):
                call(1)


@pytest.mark.ranks(at_least=2)
def test_more_than_64_bits_at_the_source_is_an_error_on_every_rank() -> None:
    calls: list[Callable[[Any], Any]] = [idist.broadcast, lambda number: idist.scatter([number] * (last() + 1))]
    for call in calls:
        if idist.get_rank() == 0:
            with raises(OverflowError, "64 bits"):
                call(2**63)
        else:
            with raises(idist.PeerFailed, "rank 0: OverflowError"):
                call(None)


@needs_numpy
@pytest.mark.parametrize(
    ("kind", "number"), [("int64", 2**53 + 1), ("int8", 5), ("float64", 0.1), ("float32", 0.5), ("bool", True)]
)
def test_numpy_scalars_count_as_numbers(kind: str, number: Any) -> None:
    import numpy as np

    given: Any = getattr(np, kind)(number)
    array: Any = np.array(given)
    same(idist.all_reduce(given, "MAX"), number)
    same(idist.all_reduce(array, "MAX"), number)
    back = idist.all_gather(given)
    assert [type(item) for item in back] == [type(given)] * idist.get_world_size()
    assert all(item == given for item in back)


@needs_numpy
def test_numpy_and_python_numbers_fit_together() -> None:
    import numpy as np

    given = np.int64(idist.get_rank()) if idist.get_rank() % 2 else idist.get_rank()
    same(idist.all_reduce(given), sum(of_all(int)))


@needs_numpy
def test_numpy_arrays_are_no_numbers() -> None:
    import numpy as np

    array: Any = np.ones(3)
    with raises(TypeError, "ndarray"):
        idist.all_reduce(array)


STEPS: dict[str, Callable[[Any, Any], Any]] = {
    "SUM": operator.add, "PRODUCT": operator.mul, "MIN": min, "MAX": max, "AND": operator.and_, "OR": operator.or_
}  # fmt: skip

EVERY_CALL: list[Callable[[Any], Any]] = [idist.all_reduce, idist.all_gather, idist.gather]
