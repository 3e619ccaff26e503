"""join: all ranks meet, or each of them hears in time who is missing or what is wrong."""

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from processes import LOOPBACK, Ended, end_ranks, free_port, run_ranks, started

from idist import rendezvous
from idist.errors import ConfigError, LaunchError
from idist.topology import Topology

SECONDS = 20.0
SHORT = 1.5
SLACK = 5.0  # what rank 0 stays so that the others can read why, and for a loaded machine

WAYS = ("tcp", "file", "env", "served")
Arguments = tuple[str | None, dict[str, Any]]
"""``init_method`` and fields of the topology."""


class Places:
    """An address for a job in each of the ways there are, for one and the same test in all of them at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def end_ranks(self, fn: Callable[..., Any], world_size: int, *args: Any) -> dict[str, list[Ended]]:
        """How ``fn(rank, arguments of the way, *args)`` ends, by way and rank."""
        with ExitStack() as stack:
            waits = {}
            for way in WAYS:
                arguments = stack.enter_context(self.place(way))
                waits[way] = stack.enter_context(started(fn, world_size, arguments, *args, timeout=SECONDS + 10))
            return {way: wait() for way, wait in waits.items()}

    def run_ranks(self, fn: Callable[..., Any], world_size: int, *args: Any) -> dict[str, list[Any]]:
        """What it returns; all have to succeed."""
        ended = self.end_ranks(fn, world_size, *args)
        assert [each for ranks in ended.values() for each in ranks if each.error is not None] == []
        return {way: [each.result for each in ranks] for way, ranks in ended.items()}

    @contextmanager
    def place(self, way: str) -> Iterator[Arguments]:
        port = free_port()
        if way == "tcp":
            yield f"tcp://{LOOPBACK}:{port}", {}
        elif way == "file":
            yield f"file://{self._folder}/store", {}
        else:
            fields = {
                "master_addr": LOOPBACK,
                "master_port": port,
                "job_token": "ours",
                "store_served": way == "served",
            }
            served = way == "served" and dist.TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False)
            yield None, fields
            del served


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path)


def meet(
    rank: int,
    world_size: int,
    arguments: Arguments,
    *,
    purpose: str = "gloo",
    timeout: float = SECONDS,
    **options: Any,
) -> rendezvous.Met:
    init_method, fields = arguments
    topology = Topology("test", rank, world_size, **fields)
    span = timedelta(seconds=timeout)
    return rendezvous.join(topology, purpose, init_method=init_method, timeout=span, **options)


def within(ended: list[Ended], seconds: float, way: str = "") -> None:
    """Each ended in time, and with one error of ours, not with one of torch's or of a hang."""
    for rank, each in enumerate(ended):
        assert each.error is not None, f"{way}: rank {rank} returned {each.result}"
        ours = each.error.startswith(("LaunchError: ", "ConfigError: ", "Trouble: "))
        assert ours, f"{way}: rank {rank} raised {each.error}\n{each.output}"
        assert each.seconds < seconds, f"{way}: rank {rank} took {each.seconds} s: {each.error}"


# All are there


def part(met: rendezvous.Met, rank: int, world_size: int) -> None:
    """Rank 0, who may serve the store, leaves last."""
    met.store.add("left", 1)
    deadline = time.monotonic() + SECONDS
    while rank == 0 and met.store.add("left", 0) < world_size:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _meets(rank: int, arguments: Any, late: int, seconds: float) -> dict[str, Any]:
    if rank == late:
        time.sleep(seconds)
    met = meet(rank, 3, arguments, prepare=lambda topology: None)
    met.store.set(f"hello/{rank}", str(os.getpid()))
    seen = [int(met.store.get(f"hello/{other}")) for other in range(3)]
    part(met, rank, 3)
    place = met.topology
    return {"pids": seen, "place": (place.local_rank, place.nproc_per_node, place.node_rank, place.nnodes)}


@pytest.mark.parametrize("late", [0, 2])
def test_all_meet_also_a_late_one(places: Places, late: int) -> None:
    for way, results in places.run_ranks(_meets, 3, late, 1.0).items():
        pids = results[0]["pids"]
        assert len(set(pids)) == 3, way
        for rank, seen in enumerate(results):
            assert seen == {"pids": pids, "place": (rank, 3, 0, 1)}, way


def test_a_world_of_one_opens_no_socket() -> None:
    before = open_files()
    met = rendezvous.join(Topology("test", 0, 1), "gloo")
    met.store.set("key", "value")
    assert met.store.get("key") == b"value"
    assert met.topology.placed
    assert met.server is None
    assert open_files() == before


def open_files() -> list[str]:
    return sorted(os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path))[1:]


# Somebody is missing, or comes twice


def _is_missing(rank: int, arguments: Any, missing: int, placed: bool) -> None:
    if rank == missing:
        raise LaunchError("this is the one")
    init_method, fields = arguments
    nodes = {"local_rank": rank, "nproc_per_node": 3, "node_rank": 0, "nnodes": 1} if placed else {}
    meet(rank, 3, (init_method, {**fields, **nodes}), timeout=SHORT)


@pytest.mark.parametrize(("missing", "placed"), [(1, False), (2, True)])
def test_a_missing_rank_is_named_on_all(places: Places, missing: int, placed: bool) -> None:
    for way, ended in places.end_ranks(_is_missing, 3, missing, placed).items():
        within(ended, SHORT + SLACK, way)
        for rank, each in enumerate(ended):
            if rank != missing:
                assert f"2 of 3 ranks met in time; never came: rank {missing}. Here: rank 0 (" in str(each.error), way
                assert each.seconds > SHORT - 0.5, way


def test_without_rank_0(places: Places) -> None:
    for way, ended in places.end_ranks(_is_missing, 3, 0, False).items():
        within(ended, SHORT + SLACK, way)
        for each in ended[1:]:
            assert "rank 0" in str(each.error), way


def _comes_too_late(rank: int, arguments: Any) -> None:
    if rank == 1:
        time.sleep(SHORT + 2.5)  # rank 0 stays 2 s after its time is over
    meet(rank, 2, arguments, timeout=SHORT)


def test_who_comes_too_late_hears_it(places: Places) -> None:
    for way, (first, late) in places.end_ranks(_comes_too_late, 2).items():
        within([first, late], 2 * SHORT + 2.5 + SLACK, way)
        assert "never came: rank 1" in str(first.error), way
        if way in ("file", "served"):  # it is there to be read
            assert "never came: rank 1" in str(late.error), way


def _twice(process: int, arguments: Any) -> None:
    meet((0, 1, 1)[process], 3, arguments, timeout=SHORT)


def test_a_rank_that_comes_twice(places: Places) -> None:
    """Two processes with one rank: never two meetings, and all of them hear of it."""
    for way, ended in places.end_ranks(_twice, 3).items():
        within(ended, SHORT + SLACK, way)
        if way in ("tcp", "env"):  # elsewhere the second may be one that was started in place of the first
            assert all("rank 1 came twice: process" in str(each.error) for each in ended), way


# The wrong address


@pytest.mark.parametrize("host", [LOOPBACK, "192.0.2.199", "no-such-host.invalid"])
def test_an_address_where_nobody_is(host: str) -> None:
    begun = time.monotonic()
    with pytest.raises(LaunchError, match=r"rank 1 of 2 on .* could not reach the store of its job at") as caught:
        meet(1, 2, (f"tcp://{host}:{free_port()}", {}), timeout=1.0)
    assert host in str(caught.value)
    assert "Is rank 0 running, and can this host reach it?" in str(caught.value)
    assert time.monotonic() - begun < 1 + SLACK


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "does not know where to meet. Set MASTER_ADDR and MASTER_PORT"),
        ({"master_addr": LOOPBACK}, "MASTER_ADDR=127.0.0.1 is known but MASTER_PORT is not. Set MASTER_PORT"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_no_address(rank: int, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        meet(rank, 2, (None, fields), timeout=1)
    assert message in str(caught.value)


@pytest.mark.parametrize("address", ["tcp://host", "tcp://:80", "tcp://host:port", "http://host:80", "file://", "x"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ConfigError, match="init_method"):
        meet(1, 2, (address, {}), timeout=1)


def test_a_port_that_is_taken() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"rank 0 cannot listen at 127\.0\.0\.1, port {port}: .*in use"):
            meet(0, 2, (f"tcp://{LOOPBACK}:{port}", {}), timeout=1)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_a_rendezvous_on_one_node_listens_on_loopback_only(host: str) -> None:
    if host == "::1" and not has_ipv6_loopback():
        pytest.skip("this machine has no ::1")
    server = rendezvous.serve(host, 0, None, 2)
    listening = [address for address, port in listeners() if port == server.port]
    assert listening in (["127.0.0.1"], ["::1"], ["127.0.0.2"]), listening


def test_a_rendezvous_of_several_nodes_listens_for_them() -> None:
    server = rendezvous.serve(socket.gethostname(), 0, None, 2)
    listening = [address for address, port in listeners() if port == server.port]
    assert listening in (["::"], ["0.0.0.0"])


def has_ipv6_loopback() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def listeners() -> list[tuple[str, int]]:
    """Address and port of every socket on which this process listens."""
    own = {entry for entry in open_files() if entry.startswith("socket:")}
    found = []
    for file, family in (("/proc/net/tcp", socket.AF_INET), ("/proc/net/tcp6", socket.AF_INET6)):
        for line in Path(file).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                address, port = fields[1].split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.append((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found


# Ranks that do not belong together


def _of_another_job(rank: int, port: int) -> None:
    fields = {"master_addr": LOOPBACK, "master_port": port, "job_token": "ours" if rank == 0 else "theirs"}
    meet(rank, 2, (None, fields), timeout=SHORT)


def test_another_jobs_token() -> None:
    ours, theirs = end_ranks(_of_another_job, 2, free_port())
    within([ours, theirs], SHORT + SLACK)
    assert "never came: rank 1" in str(ours.error)
    assert "is not ours: its store was opened for job ours, 2 ranks; this process is of job theirs" in str(theirs.error)
    assert theirs.seconds < 2


def _disagrees(rank: int, arguments: Any, what: str) -> None:
    odd = rank == 2
    purpose = "nccl" if odd and what == "purpose" else "gloo"
    meet(rank, 4 if odd and what == "world size" else 3, arguments, purpose=purpose, timeout=SHORT)


def test_another_backend_on_one_rank(places: Places) -> None:
    for way, ended in places.end_ranks(_disagrees, 3, "purpose").items():
        within(ended, SHORT + SLACK, way)
        for each in ended:
            assert "'gloo'" in str(each.error), way
            assert "'nccl'" in str(each.error), way


def test_another_world_size_on_one_rank(places: Places) -> None:
    for way, ended in places.end_ranks(_disagrees, 3, "world size").items():
        within(ended, SHORT + SLACK, way)
        if way in ("tcp", "env"):
            assert "opened for job" in str(ended[2].error), way
            assert "3 ranks" in str(ended[2].error), way
            assert "4 ranks" in str(ended[2].error), way
            assert all("never came: rank 2" in str(each.error) for each in ended[:2]), way


class Trouble(Exception):
    pass


def _in_trouble(rank: int, arguments: Any, troubled: int) -> None:
    def prepare(topology: Topology) -> None:
        if rank == troubled:
            raise Trouble("the device is on fire")

    meet(rank, 3, arguments, prepare=prepare)


@pytest.mark.parametrize("troubled", [0, 1])
def test_trouble_on_one_rank_is_heard_by_all(places: Places, troubled: int) -> None:
    said = f"LaunchError: rank {troubled} on {socket.gethostname()} could not start: the device is on fire"
    for way, ended in places.end_ranks(_in_trouble, 3, troubled).items():
        within(ended, SLACK, way)
        for rank, each in enumerate(ended):
            assert each.error == ("Trouble: the device is on fire" if rank == troubled else said), way


def _dies(rank: int, arguments: Any, victim: int) -> None:
    def prepare(topology: Topology) -> None:
        if rank == victim:
            os._exit(0)

    meet(rank, 3, arguments, timeout=SHORT, prepare=prepare)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_while_they_meet(places: Places, victim: int) -> None:
    for way, ended in places.end_ranks(_dies, 3, victim).items():
        assert ended.pop(victim).error == "it ended without an answer", way
        within(ended, SHORT + SLACK, way)


# Several times at one place


def _over_and_over(rank: int, arguments: Any, times: int) -> list[str]:
    generator = random.Random(rank)
    seen = []
    for turn in range(times):
        time.sleep(generator.uniform(0, 0.05))
        met = meet(rank, 2, arguments, purpose=f"turn {turn}")
        met.store.set(f"{rank}", f"{turn}")
        seen.append(met.store.get(f"{1 - rank}").decode())
        part(met, rank, 2)
        del met
    return seen


def test_over_and_over(places: Places) -> None:
    times = 8
    for way, results in places.run_ranks(_over_and_over, 2, times).items():
        assert results == [[str(turn) for turn in range(times)]] * 2, way


def test_a_file_that_a_dead_job_has_left(tmp_path: Path) -> None:
    """The job at the same path that comes after is another attempt, not confused by what it finds."""
    file = tmp_path / "store"
    arguments = (f"file://{file}", {})
    end_ranks(_dies, 3, arguments, 1)
    assert file.stat().st_size > 0
    results = run_ranks(_meets, 3, arguments, 0, 0.1)
    assert len(set(results[0]["pids"])) == 3


# No port is known


def test_candidates_are_the_same_for_all_and_below_the_clients_ports() -> None:
    ports = rendezvous.candidate_ports("job 1")
    assert ports == rendezvous.candidate_ports("job 1") != rendezvous.candidate_ports("job 2")
    assert len(set(ports)) == len(ports) >= 8
    assert all(1024 < port < 32768 for port in ports)


ROUNDS = 20


def _with_candidates(process: int, candidates: list[list[int]]) -> list[list[str]]:
    """Processes 0 and 1 are one job, 2 and 3 another; all of them try the same ports, in turn."""
    job, rank = f"job {process // 2}", process % 2
    generator = random.Random(process)
    seen = []
    for turn in range(ROUNDS):
        rendezvous.candidate_ports = lambda token, turn=turn: candidates[turn]  # type: ignore[misc]
        time.sleep(generator.uniform(0, 0.2))
        met = meet(rank, 2, (None, {"master_addr": LOOPBACK, "job_token": f"{job}, turn {turn}"}))
        met.store.set(f"{rank}", f"{job}, turn {turn}")
        seen.append([met.store.get("0").decode(), met.store.get("1").decode()])
        part(met, rank, 2)
        del met
    return seen


@contextmanager
def strangers(turn: int, ports: list[int]) -> Iterator[None]:
    """The first ports are taken: by the store of a third job; in one turn by who hangs up, in one by who is silent."""
    with ExitStack() as stack:
        if turn in (5, 11):
            server = stack.enter_context(socket.create_server((LOOPBACK, ports[0])))
            if turn == 5:
                threading.Thread(target=_hang_up, args=(server,), daemon=True).start()
        stores = [rendezvous.serve(LOOPBACK, port, "job 3", 2) for port in ports[1 : 1 + turn % 3]]
        yield
        del stores


def _hang_up(server: socket.socket) -> None:
    while True:
        try:
            server.accept()[0].close()
        except OSError:
            return


@pytest.mark.timeout(100)
def test_never_a_wrong_peer_whoever_has_the_ports() -> None:
    candidates = [[free_port() for _ in range(6)] for _ in range(ROUNDS)]
    with ExitStack() as stack:
        for turn, ports in enumerate(candidates):
            stack.enter_context(strangers(turn, ports))
        results = run_ranks(_with_candidates, 4, candidates, timeout=80)
    for process, seen in enumerate(results):
        assert seen == [[f"job {process // 2}, turn {turn}"] * 2 for turn in range(ROUNDS)]
