"""Slurm's host lists and lists of tasks per node."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idist.environments import hostlist
from idist.errors import LaunchError


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", "node1"),
        ("node1,node3", "node1 node3"),
        ("node[1-4]", "node1 node2 node3 node4"),
        ("node[1-2,4]", "node1 node2 node4"),
        ("node[1-4,07-09],login1", "node1 node2 node3 node4 node07 node08 node09 login1"),
        ("node[08-11]", "node08 node09 node10 node11"),
        ("node[098-101]", "node098 node099 node100 node101"),
        ("rack[1-2]n[01-03]", "rack1n01 rack1n02 rack1n03 rack2n01 rack2n02 rack2n03"),
        ("gpu-[1-2]-ib,cpu-a", "gpu-1-ib gpu-2-ib cpu-a"),
        ("[1-2]", "1 2"),
        ("10.0.0.[1-2]", "10.0.0.1 10.0.0.2"),
    ],
)
def test_hosts(text: str, hosts: str) -> None:
    assert hostlist.hosts(text) == tuple(hosts.split())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "a host name is missing"),
        ("node1,", "a host name is missing"),
        (",node1", "a host name is missing"),
        ("node1,,node2", "a host name is missing"),
        ("node[1-", "'[' at position 5 has no partner"),
        ("node1]", "']' at position 6 has no partner"),
        ("node[1-[2]]", "'[' at position 5"),
        ("node[]", "'' between brackets"),
        ("node[1-2,]", "'' between brackets"),
        ("node[a-c]", "'a-c' between brackets"),
        ("node[1-2-3]", "'1-2-3' between brackets"),
        ("node[4-1]", "the range 4-1 runs backwards"),
        ("node[0-99999999999]", "more than 65536 hosts"),
        ("n[1-60000],m[1-60000]", "more than 65536 hosts"),
        ("n[1-60000]m[1-60000]r[1-60000]", "more than 65536 hosts"),
    ],
)
def test_what_is_no_host_list_is_told_with_the_reason(text: str, problem: str) -> None:
    with pytest.raises(LaunchError) as caught:
        hostlist.hosts(text)
    assert problem in str(caught.value)
    assert "Expected one like" in str(caught.value)


@given(st.text("n1-2,[]0a(", max_size=20))
def test_any_text_is_a_list_or_a_launch_error(text: str) -> None:
    with contextlib.suppress(LaunchError):
        assert hostlist.hosts(text)


@given(st.lists(st.integers(0, 300), min_size=1, unique=True), st.integers(1, 3))
def test_a_list_comes_back_as_it_was_written(numbers: list[int], width: int) -> None:
    names = [f"n{number:0{width}d}" for number in numbers]
    assert hostlist.hosts(",".join(names)) == tuple(names)
    assert hostlist.hosts(f"n[{','.join(name[1:] for name in names)}]") == tuple(names)


@given(
    st.lists(
        st.lists(
            st.one_of(st.sampled_from(["a", "n-", ".x"]), st.tuples(st.integers(0, 30), st.integers(0, 4))), min_size=1
        ),
        min_size=1,
        max_size=3,
    )
)
def test_a_list_is_every_combination_of_its_ranges(entries: list[list[str | tuple[int, int]]]) -> None:
    def written(part: str | tuple[int, int]) -> str:
        return part if isinstance(part, str) else f"[{part[0]}-{part[0] + part[1]}]"

    def read(part: str | tuple[int, int]) -> list[str]:
        return [part] if isinstance(part, str) else [str(part[0] + index) for index in range(part[1] + 1)]

    parts = [entry[:3] for entry in entries]
    expected = tuple("".join(word) for entry in parts for word in itertools.product(*map(read, entry)))
    assert hostlist.hosts(",".join("".join(map(written, entry)) for entry in parts)) == expected


@pytest.mark.parametrize(("node", "tasks"), [(0, 2), (2, 2), (3, 1), (4, 10)])
def test_tasks_on_a_node(node: int, tasks: int) -> None:
    assert hostlist.tasks_on("2(x3),1,10", node) == tasks


def test_total_tasks() -> None:
    assert hostlist.total_tasks("2(x3),1,10") == (5, 17)
    assert hostlist.total_tasks("1(x99999999)") == (99999999, 99999999)


def test_tasks_beyond_the_list() -> None:
    with pytest.raises(LaunchError, match="the tasks of 4 nodes; there is none at place 4"):
        hostlist.tasks_on("2(x3),1", 4)


@pytest.mark.parametrize("text", ["", "2(x3", "2(3)", "a", "1,,2", "-1"])
def test_what_is_no_list_of_tasks(text: str) -> None:
    with pytest.raises(LaunchError, match="not a list of tasks per node"):
        hostlist.tasks_on(text, 0)


@given(st.text("0123(x),- ", max_size=16), st.integers(0, 5))
def test_any_text_is_a_list_of_tasks_or_a_launch_error(text: str, node: int) -> None:
    with contextlib.suppress(LaunchError):
        nodes, tasks = hostlist.total_tasks(text)
        assert nodes >= 0
        assert tasks >= 0
        if node >= nodes:
            with pytest.raises(LaunchError):
                hostlist.tasks_on(text, node)
        else:
            assert 0 <= hostlist.tasks_on(text, node) <= tasks


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5)), min_size=1, max_size=6))
def test_a_list_of_tasks_comes_back_as_it_was_written(runs: list[tuple[int, int]]) -> None:
    """With ``(x1)`` and without it."""
    text = ",".join(f"{count}(x{repeat})" if repeat > 1 or count % 2 else str(count) for count, repeat in runs)
    tasks = [count for count, repeat in runs for _ in range(repeat)]
    assert hostlist.total_tasks(text) == (len(tasks), sum(tasks))
    assert [hostlist.tasks_on(text, node) for node in range(len(tasks))] == tasks
