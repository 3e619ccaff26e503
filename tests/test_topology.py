"""Topology: what it refuses, and how it derives the nodes from the hosts of the ranks."""

import dataclasses
import itertools

import pytest

from idist.errors import LaunchError
from idist.topology import SERIAL, UNKNOWN, Topology


def placed(hosts: str) -> list[tuple[int, int, int, int]]:
    """(local_rank, nproc_per_node, node_rank, nnodes) by rank, where ``hosts`` has a letter for each rank."""
    topologies = [Topology("test", rank, len(hosts)).place(list(hosts)) for rank in range(len(hosts))]
    return [(each.local_rank, each.nproc_per_node, each.node_rank, each.nnodes) for each in topologies]


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("a", [(0, 1, 0, 1)]),
        ("aa", [(0, 2, 0, 1), (1, 2, 0, 1)]),
        ("ab", [(0, 1, 0, 2), (0, 1, 1, 2)]),
        # Uneven: nproc_per_node is that of THIS node.
        ("aab", [(0, 2, 0, 2), (1, 2, 0, 2), (0, 1, 1, 2)]),
        ("abb", [(0, 1, 0, 2), (0, 2, 1, 2), (1, 2, 1, 2)]),
        # Cyclic, and with nodes in an order that is not that of their names.
        ("baba", [(0, 2, 0, 2), (0, 2, 1, 2), (1, 2, 0, 2), (1, 2, 1, 2)]),
        ("abca", [(0, 2, 0, 3), (0, 1, 1, 3), (0, 1, 2, 3), (1, 2, 0, 3)]),
    ],
)
def test_place(hosts: str, expected: list[tuple[int, int, int, int]]) -> None:
    """KNOWN-FAILURES 10: right for every placement."""
    assert placed(hosts) == expected


@pytest.mark.parametrize("hosts", ["".join(hosts) for hosts in itertools.product("abc", repeat=4)])
def test_every_placement_of_four_ranks_on_three_hosts(hosts: str) -> None:
    """KNOWN-FAILURES 10: what holds for all ranks together."""
    places = placed(hosts)
    assert len({(node, local) for local, _, node, _ in places}) == 4
    for host, (local, size, node, nodes) in zip(hosts, places, strict=True):
        assert size == hosts.count(host)
        assert 0 <= local < size
        assert nodes == len(set(hosts))
        assert {place[2] for place, other in zip(places, hosts, strict=True) if other == host} == {node}
    first_ranks = [hosts.index(host) for host in set(hosts)]
    assert [places[rank][2] for rank in sorted(first_ranks)] == list(range(len(first_ranks)))


def test_place_keeps_the_rest_and_makes_a_new_value() -> None:
    unplaced = Topology("test", 1, 2, master_addr="host", master_port=1, job_token="t", evidence=("RANK=1",))
    there = unplaced.place(["a", "b"])
    assert (unplaced.placed, there.placed) == (False, True)
    assert unplaced.nproc_per_node == unplaced.node_rank == unplaced.nnodes == UNKNOWN
    assert dataclasses.replace(there, local_rank=-1, nproc_per_node=-1, node_rank=-1, nnodes=-1) == unplaced


def test_place_wants_a_host_for_every_rank() -> None:
    with pytest.raises(LaunchError, match="1 hosts were given for world size 2"):
        Topology("test", 0, 2).place(["a"])


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"rank": 2, "world_size": 2}, "rank 2 is not in the range of 2"),
        ({"rank": -1, "world_size": 2}, "rank -1 is not in the range of 2"),
        ({"rank": 0, "world_size": 0}, "rank 0 is not in the range of 0"),
        ({"local_rank": 2}, "local rank 2 is not in the range of 2"),
        ({"local_rank": -2}, "local rank -2 is not in the range of 2"),
        ({"node_rank": 2}, "node rank 2 is not in the range of 2"),
        ({"node_rank": UNKNOWN}, "node rank -1 is not in the range of 2"),
        ({"nproc_per_node": UNKNOWN}, "local rank 0 is not in the range of -1"),
        ({"local_rank": UNKNOWN}, "some of the node fields are known and some are not"),
        ({"nnodes": 4}, "2 processes on this node leave 2 of world size 4 for 3 other nodes"),
        ({"nproc_per_node": 3, "node_rank": 0, "nnodes": 1}, "3 processes on this node leave 1 of world size 4 for 0"),
        ({"nproc_per_node": 5}, "5 processes on this node are more than world size 4"),
        ({"nnodes": 5}, "5 nodes are more than world size 4"),
        ({"master_port": 65536}, "master port 65536"),
        ({"master_port": -1}, "master port -1"),
    ],
)
def test_contradictions_are_errors_that_show_the_evidence(fields: dict[str, int], problem: str) -> None:
    right = {"rank": 0, "world_size": 4, "local_rank": 0, "nproc_per_node": 2, "node_rank": 1, "nnodes": 2}
    assert Topology("test", **right).placed  # type: ignore[arg-type]
    with pytest.raises(LaunchError, match=f"^test: {problem}.*WORLD_SIZE=4") as caught:
        Topology("test", evidence=("WORLD_SIZE=4",), **{**right, **fields})  # type: ignore[arg-type]
    assert isinstance(caught.value, RuntimeError)


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SERIAL.rank = 1  # type: ignore[misc]
    assert SERIAL == Topology("serial", 0, 1, 0, 1, 0, 1)
