"""Groups: lists, tuples, handles; members, others; and what they cost."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

import idist
from conformance.values import filled, last, raises, received, reduced, same, side_by_side, snapshot

RANKS: dict[str, Callable[[int], list[int]]] = {
    "all": lambda size: list(range(size)),
    "all, reversed": lambda size: list(range(size))[::-1],
    "the first alone": lambda size: [0],
    "the last alone": lambda size: [size - 1],
    "all but the last": lambda size: list(range(size))[: max(size - 1, 1)],
    "all but the first, reversed": lambda size: list(range(size))[: -size if size == 1 else 0 : -1] or [0],
    "every other": lambda size: list(range(0, size, 2)),
}
FORMS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "handle": idist.new_group,
}
VALUES: dict[str, Callable[[int], Any]] = {
    "int": lambda rank: rank,
    "float": lambda rank: 0.1 * rank,
    "string": lambda rank: "é" * rank * 100,
    "object": lambda rank: {"rank": [rank]},
}
BAD: list[Any] = [
    [],
    (),
    [0, 0],
    [100],
    [-1],
    [0.0],
    ["0"],
    [None],
    [True],
    [[0]],
    "0",
    {0},
    0,
    1.5,
    object,
    torch.zeros(1),
]


def in_group(ranks: str, form: str) -> tuple[list[int], Any, bool]:
    """The ranks in ascending order, the group, and whether this rank is one of them."""
    chosen = RANKS[ranks](idist.get_world_size())
    return sorted(chosen), FORMS[form](chosen), idist.get_rank() in chosen


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("form", FORMS)
def test_tensors(ranks: str, form: str) -> None:
    members, group, member = in_group(ranks, form)
    given = filled(idist.get_rank(), torch.float32, (12, 2))
    before = snapshot(given)
    parts = [filled(rank, torch.float32, (12, 2)) for rank in members]
    index = members.index(idist.get_rank()) if member else 0
    expected = {
        "all_reduce": reduced("MAX", parts),
        "all_gather": side_by_side(parts),
        "broadcast": parts[-1],
        "reduce_scatter": reduced("SUM", parts).chunk(len(members))[index],
        "all_to_all": side_by_side([part.chunk(len(members))[index] for part in parts]),
    }
    results = {
        "all_reduce": idist.all_reduce(given, "MAX", group=group),
        "all_gather": idist.all_gather(given, group=group),
        "broadcast": idist.broadcast(given, src=members[-1], group=group),
        "reduce_scatter": idist.reduce_scatter(given, group=group),
        "all_to_all": idist.all_to_all(given, group=group),
    }
    for call, result in results.items():
        if member:
            same(result, expected[call])
        else:
            assert result is given, call
    same(given, before)
    assert idist.all_reduce_(given, "MAX", group=group) is given
    same(given, expected["all_reduce"] if member else before)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("form", FORMS)
def test_gather_and_scatter(ranks: str, form: str) -> None:
    members, group, member = in_group(ranks, form)
    rank, root = idist.get_rank(), members[-1]
    parts = [filled(other, torch.int16, (2,)) for other in members]
    gathered = idist.gather(filled(rank, torch.int16, (2,)), dst=root, group=group)
    same(gathered, side_by_side(parts) if rank == root else None)
    same(idist.gather(f"é{rank}", dst=root, group=group), [f"é{other}" for other in members] if rank == root else None)
    given: Any
    for given in (parts, [f"é{other}" * 200 for other in members]):
        mine = given if rank == root else None
        result = idist.scatter(mine, src=root, group=group)
        if member:
            same(result, received(given[members.index(rank)]))
        else:
            assert result is mine


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", VALUES)
def test_values(ranks: str, kind: str) -> None:
    """KNOWN-FAILURES 16: a gather of strings in a group of some ranks hung."""
    members, group, member = in_group(ranks, "list")
    given, parts = VALUES[kind](idist.get_rank()), [VALUES[kind](rank) for rank in members]
    results = [idist.all_gather(given, group=group), idist.broadcast(given, src=members[-1], group=group)]
    if isinstance(given, (int, float)):
        results.append(idist.all_reduce(given, "MAX", group=group))
    if member:
        same(results, [parts, parts[-1], parts[-1]][: len(results)])
    else:
        assert all(result is given for result in results)


@pytest.mark.parametrize("ranks", RANKS)
def test_shapes(ranks: str) -> None:
    members, group, member = in_group(ranks, "list")
    parts = [filled(rank, torch.float32, (rank + 1, 2)) for rank in members]
    given = filled(idist.get_rank(), torch.float32, (idist.get_rank() + 1, 2))
    uneven = idist.all_gather(given, group=group, uneven=True)
    listed = idist.all_gather_tensors_with_shapes(given, [part.shape for part in parts], group=group)
    same([uneven, listed], [side_by_side(parts), parts] if member else [given, [given]])


@pytest.mark.parametrize("ranks", RANKS)
def test_async(ranks: str) -> None:
    members, group, member = in_group(ranks, "tuple")
    given = torch.full((12,), float(idist.get_rank()))
    in_place = given.clone()
    handles = {
        "all_reduce": idist.all_reduce(given, group=group, async_op=True),
        "all_reduce_": idist.all_reduce_(in_place, group=group, async_op=True),
        "all_gather": idist.all_gather(given, group=group, async_op=True),
        "broadcast": idist.broadcast(given, src=members[0], group=group, async_op=True),
        "reduce_scatter": idist.reduce_scatter(given, group=group, async_op=True),
        "all_to_all": idist.all_to_all(given, group=group, async_op=True),
        "scatter": idist.scatter([given] * len(members), src=members[0], group=group, async_op=True),
    }
    results = {call: handle.wait() for call, handle in handles.items()}
    assert results.pop("all_reduce_") is in_place
    scattered = results.pop("scatter")
    if member:
        total = float(sum(members))
        same(scattered, received(torch.full((12,), float(members[0]))))
        same(results["all_reduce"], torch.full((12,), total))
        same(results["all_gather"], side_by_side([torch.full((12,), float(rank)) for rank in members]))
        same(results["broadcast"], torch.full((12,), float(members[0])))
        same(results["reduce_scatter"], torch.full((12 // len(members),), total))
        same(results["all_to_all"], side_by_side([torch.full((12 // len(members),), float(r)) for r in members]))
    else:
        assert all(result is given for result in [*results.values(), *scattered])


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize("value", [torch.zeros(5, 2), torch.tensor(1.0)], ids=["does not divide", "0-d"])
def test_what_is_no_member_may_pass_any_tensor(value: torch.Tensor) -> None:
    members = list(range(last())) or [0]
    given = torch.zeros(6, 2) if idist.get_rank() in members else value
    for call in (idist.reduce_scatter, idist.all_to_all):
        result = call(given, group=members)
        if idist.get_rank() not in members:
            assert result is given


@pytest.mark.parametrize("ranks", RANKS)
def test_barrier(ranks: str) -> None:
    members, group, _ = in_group(ranks, "list")
    for _ in range(3):
        idist.barrier(group)
    if idist.get_rank() == members[0]:
        idist.barrier(group=[members[0]])


@pytest.mark.parametrize("ranks", RANKS)
def test_a_group_and_then_all(ranks: str) -> None:
    """KNOWN-FAILURES 26: after a collective of some ranks, one of all."""
    _, group, member = in_group(ranks, "list")
    for _ in range(5):
        if member:  # the others need not even come here
            idist.all_gather("x" * 300, group=group)
        same(idist.all_reduce(1), idist.get_world_size())
        if member:
            idist.all_reduce(torch.ones(3), group=group)
        same(idist.all_reduce(torch.ones(1)), torch.tensor([float(idist.get_world_size())]))


@pytest.mark.ranks(at_least=2)
def test_two_groups_that_do_different_things_at_the_same_time() -> None:
    size, rank = idist.get_world_size(), idist.get_rank()
    low, high = list(range(size // 2)), list(range(size // 2, size))
    if rank in low:
        for step in range(7):
            same(idist.all_gather(rank * step, group=low), [other * step for other in low])
    else:
        for step in range(3):
            same(idist.all_reduce(torch.ones(step), group=high), torch.full((step,), float(len(high))))
    same(idist.all_gather(rank), list(range(size)))


@pytest.mark.ranks(at_least=4)
def test_overlapping_groups() -> None:
    """Members that are in different numbers of groups: https://github.com/pytorch/pytorch/issues/173608."""
    rank = idist.get_rank()
    for group in ([0, 1], [1, 2], [2, 3], [0, 3], [0, 1, 2], [1, 2, 3]):
        same(idist.all_gather(rank, group=group), group if rank in group else rank)


@pytest.mark.parametrize("form", FORMS)
def test_the_same_ranks_30_times_are_one_group(form: str) -> None:
    """KNOWN-FAILURES 17: 30 calls made 31 groups, 150 file descriptors and 90 threads."""
    members = list(range(idist.get_world_size()))[: max(last(), 1)]

    def call() -> None:
        group = FORMS[form](members)
        idist.all_reduce(torch.ones(2), group=group)
        idist.all_gather("text", group=group)
        idist.barrier(group)

    for _ in range(2):  # the first makes the group, and its connections
        call()
    before = used()
    for _ in range(30):
        call()
    after = used()  # no more: the thread by which pytest watched the test before may still have been ending
    assert all(after[what] <= before[what] for what in before), (before, after)


def used() -> dict[str, int]:
    """How many file descriptors and threads this process has; asked one rank after the other, if they share it."""
    counts = {}
    for turn in range(idist.get_world_size()):
        idist.barrier()
        if idist.get_rank() == turn:
            counts = {what: len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")}
    idist.barrier()
    return counts


def test_the_same_ranks_are_the_same_handle() -> None:
    ranks = list(range(idist.get_world_size()))[: max(last(), 1)]
    handles = [idist.new_group(ranks), idist.new_group(ranks[::-1]), idist.new_group(tuple(ranks))]
    assert all(handle is handles[0] or handle == handles[0] for handle in handles)


@pytest.mark.ranks(at_least=2)
def test_only_members_need_to_make_a_group() -> None:
    ranks = [0, last()]
    if idist.get_rank() in ranks:
        handle = idist.new_group(ranks)
        same(idist.all_gather(idist.get_rank(), group=handle), ranks)
    same(idist.all_reduce(1), idist.get_world_size())


def test_unknown_option_of_a_group() -> None:
    with pytest.raises(TypeError, match="nonsense"):
        idist.new_group(list(range(idist.get_world_size())), nonsense=1)


@pytest.mark.parametrize("group", BAD, ids=repr)
def test_bad_group(group: Any) -> None:
    for value in (torch.zeros(4), 1):
        for call in (idist.all_reduce, idist.all_gather, idist.broadcast, idist.gather):
            with raises(idist.ConfigError):
                call(value, group=group)
    for tensor_call in (idist.reduce_scatter, idist.all_to_all, idist.all_reduce_):
        with raises(idist.ConfigError):
            tensor_call(torch.zeros(4), group=group)
    with raises(idist.ConfigError):
        idist.scatter([1], group=group)
    with raises(idist.ConfigError):
        idist.all_gather_tensors_with_shapes(torch.zeros(4), [(4,)], group=group)
    with raises(idist.ConfigError):
        idist.barrier(group)


@pytest.mark.parametrize("ranks", [*BAD, None], ids=repr)
def test_bad_ranks_of_a_new_group(ranks: Any) -> None:
    with raises(idist.ConfigError):
        idist.new_group(ranks)


def test_a_rank_that_is_not_in_this_job_is_named() -> None:
    size = idist.get_world_size()
    with raises(idist.ConfigError, f"rank {size} is not in this job", f"0 to {size - 1}"):
        idist.new_group([0, size])


@pytest.mark.ranks(at_least=2)
@pytest.mark.parametrize("value", [torch.zeros(2), 1, "a"], ids=repr)
def test_root_outside_of_the_group(value: Any) -> None:
    group = list(range(last())) or [0]
    if idist.get_rank() in group:
        for call, name in ((idist.broadcast, "src"), (idist.scatter, "src"), (idist.gather, "dst")):
            with raises(idist.ConfigError, name, str(last()), str(group)):
                call(value, last(), group=group)


def test_the_world_is_a_group_of_its_own_library() -> None:
    handle = idist.new_group(range(idist.get_world_size()))
    assert handle is not None
    assert idist.all_gather(idist.get_rank(), group=handle) == list(range(idist.get_world_size()))
