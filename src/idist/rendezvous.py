"""Where the ranks of a job meet: a store that proves to be the job's own, and that tells who is missing.

The store is torch's. What is added: the job's token is checked before anything else is read, every
rank is claimed once, and all ranks get the same verdict - all here, or one error that names who
failed or never came.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import ipaddress
import itertools
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import torch.distributed as dist

from idist import horovodrun, mpiexec
from idist.environments.horovod import Horovod
from idist.environments.mpi import Mpi
from idist.errors import ConfigError, LaunchError
from idist.topology import Topology, places

DEFAULT_TIMEOUT = timedelta(minutes=5)
"""How long ranks wait for each other where the user gave no timeout: torch's default for stores."""

_RETRY_S = 0.2
_FIRST_RETRY_S = 0.01
_POLL_S = 0.05
_FIRST_POLL_S = 0.001
_PROBE_S = 2.0
_HANDSHAKE_S = 5.0
_LINGER_S = 2.0
# "Are you a store?" (VALIDATE with its number) and "are you there?" (PING), in the protocol of torch's store.
_HELLO = struct.pack("=BIBI", 0, 0x3C85F7CE, 13, 0)
_ASTRAY_S = 5.0
_CARD = "idist/job"
# This process, and no other that has or had its id; a forked one may share it, but not the rank. How often it has met.
_BORN = secrets.token_hex(8)
_TIMES = itertools.count()
# Below the ports that Linux, macOS and IANA hand out to clients (32768 and up), above the registered busy ones.
_CANDIDATE_PORTS = range(20000, 30000)
_CANDIDATES = 16
_LOCATE: dict[str, Callable[[Topology, float], Topology]] = {
    Mpi.name: mpiexec.locate,
    Horovod.name: functools.partial(horovodrun.locate, os.environ),
}


class Met(NamedTuple):
    """What a meeting gave this rank.

    Attributes:
        store: for this meeting alone.
        topology: with its node fields filled in.
        server: of the store, if this rank serves it; to be held as long as the store is used. A process group
            may be held by a model that its user keeps, and it holds the store, so that must not hold the port.
    """

    store: dist.Store
    topology: Topology
    server: dist.TCPStore | None


def join(
    topology: Topology,
    purpose: str,
    *,
    init_method: str | None = None,
    timeout: timedelta | None = None,
    prepare: Callable[[Topology], None] | None = None,
    connect: Callable[[dist.Store, Topology], None] | None = None,
) -> Met:
    """Meet all ranks of the job.

    Args:
        topology: of this process.
        purpose: what the ranks are about to do, the backend's name; they must agree on it.
        init_method: ``tcp://host:port`` or ``file:///shared/path``; default: what ``topology`` says.
        timeout: how long to wait for the others.
        prepare: called with the complete topology; if it raises on one rank, all ranks hear of it.
        connect: called when all are prepared, with the store; nobody returns before all have done it, so
            rank 0, which may serve the store, cannot be gone when others still need it.

    The ranks of one job may meet as often as they like at one address, one after the other.

    Raises:
        LaunchError: the store cannot be reached or is another job's, ranks are missing or come
            twice or want another purpose, or ``prepare`` or ``connect`` raised on another rank.

    Cost: some ten round trips to the store per rank, however many there are, and two more where the
    environment does not tell the nodes; rank 0 then reads and writes a small value for each rank at once.
    """
    deadline = time.monotonic() + (timeout or DEFAULT_TIMEOUT).total_seconds()
    scheme = urlsplit(init_method or "env://").scheme
    lasting = scheme == "file" or (scheme == "env" and topology.store_served)
    store, server, where = _open(topology, init_method, deadline)
    after = 0
    try:
        while True:
            try:
                attempt = _next_attempt(store, topology, after, deadline)
                meeting = _Meeting(store, attempt, topology, deadline)
                meeting.claim(lasting)
                complete = meeting.hold(purpose, prepare, connect)
                if server is not None:
                    meeting.see_others_off()
                return Met(meeting.store, dataclasses.replace(complete, **where), server)
            except _Past:
                after = attempt
            except dist.DistNetworkError as error:
                if lasting or topology.rank == 0:
                    raise LaunchError(
                        f"rank {topology.rank} lost the store of its job: {_first_line(error)}"
                    ) from error
            if not lasting:  # the store of a context that this rank has left, and rank 0 not yet
                if time.monotonic() > deadline:
                    raise LaunchError(
                        f"rank {topology.rank} of {topology.world_size}: rank 0 still serves the context before, which "
                        "this rank has left. All ranks have to end one before the next can begin."
                    )
                time.sleep(_RETRY_S)
                (store, server, where), after = _open(topology, init_method, deadline), 0
    except BaseException:
        del server  # or whoever keeps the error, as notebooks do, keeps this frame, and so the port
        raise


def serve(host: str, port: int, job_token: str | None, world_size: int) -> dist.TCPStore:
    """Serve the store of a job on ``host:port``; on the loopback interface alone, if that is what ``host`` is.

    Args:
        port: 0 for any free one; ``.port`` of the result tells which.

    Raises:
        OSError: the port is taken.
    """
    loopback = _is_loopback(host)
    wide = not loopback and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if wide or ":" in host else socket.AF_INET
    address = (host if loopback else "", port)
    listener = socket.create_server(address, family=family, backlog=1024, dualstack_ipv6=wide)
    port = listener.getsockname()[1]
    store = dist.TCPStore(
        host if loopback or _leads_to(listener, host) else "127.0.0.1",
        port,
        world_size,
        is_master=True,
        timeout=DEFAULT_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    store.set(_CARD, _card(job_token, world_size))
    return store


def _leads_to(listener: socket.socket, host: str) -> bool:
    """Whether ``host`` is a name of this host, as seen from here.

    By one that leads nowhere torch would try for minutes, whatever the timeout; by one that leads to another job's
    store it would write there. Of a wrong MASTER_ADDR the ranks that need it tell, in time.
    """
    try:
        with socket.create_connection((host, listener.getsockname()[1]), timeout=_PROBE_S) as caller:
            listener.settimeout(_PROBE_S)
            while True:
                called, (_, port, *_) = listener.accept()
                called.close()
                if port == caller.getsockname()[1]:
                    return True
    except OSError:
        return False
    finally:
        listener.settimeout(None)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclasses.dataclass(frozen=True, slots=True)
class _Address:
    """Where the store is: one host and port, or several that rank 0 may have taken.

    Attributes:
        hosts: those that are likely first.
        likely: how many are; the others are tried where rank 0 does not come to them.
    """

    hosts: Sequence[str]
    ports: Sequence[int]
    served: bool
    likely: int = 1

    def __str__(self) -> str:
        return f"{' or '.join(self.hosts)}, port {', '.join(map(str, self.ports))}"


def _open(
    topology: Topology, init_method: str | None, deadline: float
) -> tuple[dist.Store, dist.TCPStore | None, dict[str, Any]]:
    """The store, its server if this rank serves it, and what the topology has to say of its address."""
    if topology.world_size == 1 and init_method is None:
        return dist.HashStore(), None, {}
    url = urlsplit(init_method or "env://")
    if url.scheme == "file":
        if not url.path:
            raise ConfigError(f"init_method {init_method!r} has no path; expected file:///path/that/all/ranks/share")
        return dist.PrefixStore("idist", dist.FileStore(url.path, topology.world_size)), None, {}
    if url.scheme == "tcp":
        host, port = _host_and_port(url)
        address = _Address([host], [port], served=False)
    elif url.scheme == "env":
        if topology.environment in _LOCATE and topology.master_addr is None:
            topology = _LOCATE[topology.environment](topology, deadline)
        address = _address(topology)
    else:
        raise ConfigError(f"init_method {init_method!r} is unknown; expected tcp://host:port, file:///path or env://")
    server = _serve_first(address, topology) if topology.rank == 0 and not address.served else None
    reachable = address if server is None else dataclasses.replace(address, hosts=[server.host], ports=[server.port])
    store = _connect(reachable, _card(topology.job_token, topology.world_size), topology, deadline)
    where = {"master_addr": _public_name(address) if server else store.host, "master_port": store.port}
    return dist.PrefixStore(f"idist/{topology.job_token}", store), server, where


def _host_and_port(url: SplitResult) -> tuple[str, int]:
    with contextlib.suppress(ValueError):  # urllib's, for a port that is none
        if url.hostname and url.port:
            return url.hostname, url.port
    raise ConfigError(f"init_method {url.geturl()!r} is not tcp://host:port")


def _address(topology: Topology) -> _Address:
    told = () if topology.master_addr is None else (topology.master_addr,)
    if topology.nnodes == 1 and not topology.store_served and (told or topology.hosts):
        told = ("127.0.0.1",)  # whatever name this node has: nobody else needs to reach it
        topology = dataclasses.replace(topology, hosts=())
    hosts = tuple(dict.fromkeys((*told, *topology.hosts)))
    if not hosts:
        raise LaunchError(
            f"{topology.environment}: rank {topology.rank} of {topology.world_size} does not know where to meet. "
            "Set MASTER_ADDR and MASTER_PORT to the host of rank 0 and a free port there, or pass init_method."
        )
    if topology.master_port is not None:
        return _Address(hosts, [topology.master_port], topology.store_served, len(told) or len(hosts))
    if topology.job_token is None:
        raise LaunchError(
            f"{topology.environment}: MASTER_ADDR={hosts[0]} is known but MASTER_PORT is not. "
            "Set MASTER_PORT to a free port of that host, the same on all ranks."
        )
    return _Address(hosts, candidate_ports(topology.job_token), served=False, likely=len(told) or len(hosts))


def candidate_ports(job_token: str) -> list[int]:
    """Ports to try in turn, the same for all ranks of a job: rank 0 takes the first that it can bind.

    Two jobs with the same candidates do no harm, since the token is checked at each.
    """
    digest = hashlib.sha256(job_token.encode()).digest()
    start, step = int.from_bytes(digest[:4], "big"), 1 + 2 * digest[4]
    return [_CANDIDATE_PORTS[(start + i * step) % len(_CANDIDATE_PORTS)] for i in range(_CANDIDATES)]


def _serve_first(address: _Address, topology: Topology) -> dist.TCPStore:
    host = _public_name(address)
    for port in address.ports:
        try:
            return serve(host, port, topology.job_token, topology.world_size)
        except OSError as error:
            refused = error
    raise LaunchError(
        f"rank 0 cannot listen at {address}: {refused.strerror}. Another job on this host may have the port: "
        "choose another MASTER_PORT."
    ) from refused


def _public_name(address: _Address) -> str:
    """The name of this host, which serves the store. Of several one is this one: its own name will do."""
    return address.hosts[0] if len(address.hosts) == 1 else socket.gethostname()


def _connect(address: _Address, card: str, topology: Topology, deadline: float) -> dist.TCPStore:
    """Try the places in turn until one proves to be our job's."""
    problem = "nothing listens there"
    astray = time.monotonic() + _ASTRAY_S
    # One at a time, lest a thousand ranks knock at a thousand hosts because rank 0 is late.
    others = itertools.cycle(address.hosts[address.likely :])
    pauses = _pauses(_FIRST_RETRY_S, _RETRY_S)
    while time.monotonic() < deadline:
        another = next(others, None) if time.monotonic() > astray else None
        hosts = [*address.hosts[: address.likely], *([another] if another else [])]
        for host, port in itertools.product(hosts, address.ports):
            try:
                return _knock(host, port, card, topology, deadline)
            except _Stranger as stranger:
                problem = str(stranger)
                if len(address.hosts) == len(address.ports) == 1:
                    raise LaunchError(f"rank {topology.rank}: {host}:{port} is not ours: {problem}") from None
            except (OSError, RuntimeError) as error:
                problem = _first_line(error)
        time.sleep(next(pauses))
    raise LaunchError(
        f"rank {topology.rank} of {topology.world_size} on {socket.gethostname()} could not reach the store of its job "
        f"at {address}: {problem}. Is rank 0 running, and can this host reach it?"
    )


def _pauses(first: float, longest: float) -> Iterator[float]:
    """Seconds between two looks: who is about to come is there at once, who is late does not keep the store busy."""
    pause = first
    while True:
        yield pause
        pause = min(2 * pause, longest)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class _Stranger(Exception):
    """A store that belongs to another job."""


def _expect_a_store(host: str, port: int, left: float) -> None:
    """Raise OSError at once where a client of torch would try again until its timeout, or wait for ever.

    It does the latter for whoever accepts its connection and then says nothing. A store that does
    not understand the greeting, of another version of torch, hangs up.
    Source: https://github.com/pytorch/pytorch/blob/v2.11.0/torch/csrc/distributed/c10d/TCPStoreBackend.hpp
    """
    with socket.create_connection((host, port), timeout=min(_PROBE_S, left)) as caller:
        caller.settimeout(min(_HANDSHAKE_S, left))
        caller.sendall(_HELLO)
        try:
            caller.recv(1)  # an answer, or it hangs up: torch's client copes with both
        except TimeoutError:
            raise TimeoutError("whoever listens there says nothing") from None


def _knock(host: str, port: int, card: str, topology: Topology, deadline: float) -> dist.TCPStore:
    left = max(deadline - time.monotonic(), 0.1)
    _expect_a_store(host, port, left)
    client = dist.TCPStore(
        host,
        port,
        topology.world_size,
        is_master=False,
        timeout=timedelta(seconds=min(_HANDSHAKE_S, left)),
        wait_for_workers=False,
    )
    if topology.store_served:  # by somebody who may know nothing of us, for several attempts: the first rank signs
        theirs = client.compare_set(f"{_CARD}/{topology.job_token}", "", card).decode()
    else:
        theirs = client.get(_CARD).decode()
    if theirs != card:
        raise _Stranger(f"its store was opened for {theirs}; this process is of {card}")
    return client


def expect_answer(store: dist.Store) -> None:
    """Raise OSError at once where a call of this store would wait for ever, or have torch write a page to stderr."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        _expect_a_store(store.host, store.port, _PROBE_S)


def _card(job_token: str | None, world_size: int) -> str:
    return f"job {job_token or 'without a token'}, {world_size} ranks"


class _Past(Exception):
    """This attempt is over: its seat is taken by a process that is gone, or rank 0 has begun another one."""


def _next_attempt(store: dist.Store, topology: Topology, after: int, deadline: float) -> int:
    """The number of the attempt to take part in: a store may outlive the processes of an earlier one.

    torchrun restarts the workers of all nodes but tells them nothing by which they could know one
    attempt from another, and keeps its store. Rank 0 alone opens an attempt and closes its meeting,
    so none can succeed in which rank 0 is of the past.
    """
    if topology.rank == 0:
        return int(store.add("attempt", 1))
    pauses = _pauses(_FIRST_POLL_S, _POLL_S)
    while (attempt := int(store.add("attempt", 0))) <= after:
        if time.monotonic() > deadline:
            raise LaunchError(
                f"rank {topology.rank} of {topology.world_size} waited in vain for rank 0 "
                + (f"to come again: attempt {after} is over" if after else "to come")
            )
        time.sleep(next(pauses))
    return attempt


class _Meeting:
    """One attempt: all ranks say who they are, prepare, and wait for one verdict.

    Attributes:
        store: for this attempt alone.
    """

    def __init__(self, store: dist.Store, attempt: int, topology: Topology, deadline: float) -> None:
        self.store = dist.PrefixStore(f"attempt/{attempt}", store)
        self._all_attempts = store
        self._attempt = attempt
        self._topology = topology
        self._deadline = deadline

    def claim(self, lasting: bool) -> None:
        """Take this rank's seat. Two processes with one rank are two jobs, a wrong launch, or two attempts.

        Args:
            lasting: the store outlives the processes that meet there.
        """
        me = {
            "host": socket.gethostname(),
            "node": self._topology.node or socket.gethostname(),
            "pid": os.getpid(),
            "born": _BORN,
            "times": next(_TIMES),
        }
        said = json.dumps(me)
        owner = self.store.compare_set(self._seat(self._topology.rank), "", said).decode()
        if owner == said:
            return
        who = json.loads(owner)
        if lasting or (who["born"], who["pid"]) == (_BORN, os.getpid()):
            raise _Past
        with self._telling_others():
            raise LaunchError(
                f"rank {self._topology.rank} came twice: process {who['pid']} on {who['host']} and process "
                f"{os.getpid()} on {socket.gethostname()}. Do two jobs meet at one address?"
            )

    def hold(
        self,
        purpose: str,
        prepare: Callable[[Topology], None] | None,
        connect: Callable[[dist.Store, Topology], None] | None,
    ) -> Topology:
        """Meet; return the topology with its node fields filled in.

        Raises:
            _Past: rank 0 has begun another attempt meanwhile.
        """
        try:
            self._agree_on(purpose)
            if not self._topology.placed:
                self._gather_at("claimed", self._tell_places)
                fields = json.loads(self.store.get(self._place(self._topology.rank)))
                self._topology = dataclasses.replace(self._topology, **fields)
            if prepare is not None:
                with self._telling_others():
                    prepare(self._topology)
            self._gather_at("ready")
            if connect is not None:
                with self._telling_others():
                    connect(self.store, self._topology)
            self._gather_at("connected")
            self.store.add("gone", 1)
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise LaunchError(
                f"rank {self._topology.rank} lost the store of its job while the ranks met; rank 0 serves it, "
                f"so look for its error first ({_first_line(error)})"
            ) from error
        return self._topology

    def see_others_off(self) -> None:
        """Rank 0, which serves the store, stays until the others have read the verdict."""
        until, pauses = time.monotonic() + _LINGER_S, _pauses(_FIRST_POLL_S, _POLL_S)
        while self.store.add("gone", 0) < self._topology.world_size and time.monotonic() < until:
            time.sleep(next(pauses))

    def _agree_on(self, purpose: str) -> None:
        first = self.store.compare_set("purpose", "", purpose).decode()
        with self._telling_others():
            if first != purpose:
                raise LaunchError(f"this rank is to start {purpose!r}, but others {first!r}; all ranks need the same")

    def _gather_at(self, stage: str, before: Callable[[], None] | None = None) -> None:
        """Wait until every rank is at ``stage``. Rank 0, or whoever fails, speaks the verdict; rank 0 ``before`` it."""
        if self.store.add(f"at/{stage}", 1) == self._topology.world_size:
            self.store.set(f"all at/{stage}", "yes")
        if self._topology.rank == 0:
            self._wait_for(f"all at/{stage}", stage)
            if before is not None and self.store.get(f"all at/{stage}") == b"yes":
                before()
            self._say(stage, "go")
        self._wait_for(stage, stage)
        verdict = self.store.get(stage).decode()
        if verdict != "go":
            self._leave_together()
            raise LaunchError(verdict)

    def _wait_for(self, key: str, stage: str) -> None:
        pauses = _pauses(_FIRST_POLL_S, _POLL_S)
        while not self.store.check([key]):
            if int(self._all_attempts.add("attempt", 0)) > self._attempt:
                raise _Past
            if time.monotonic() > self._deadline:
                self._say(stage, self._missing())
                continue
            time.sleep(next(pauses))  # not store.wait, which writes two lines to stderr when it waits in vain

    @contextlib.contextmanager
    def _telling_others(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            said = f"rank {self._topology.rank} on {socket.gethostname()} could not start: {error}"
            for stage in ("claimed", "ready", "connected"):
                self._say(stage, said)
            self._leave_together()
            raise

    def _say(self, stage: str, verdict: str) -> None:
        """The first verdict counts; after one, rank 0 need not wait for the rest."""
        self.store.compare_set(stage, "", verdict)
        self.store.set(f"all at/{stage}", "no matter")

    def _leave_together(self) -> None:
        """Rank 0 may serve the store: it stays for a moment so that the others can read why."""
        if self._topology.rank == 0 and self._topology.world_size > 1:
            time.sleep(_LINGER_S)

    def _tell_places(self) -> None:
        """Rank 0 reads who is where, so that each rank reads one value and not one for each rank."""
        ranks = range(self._topology.world_size)
        said = self._read([self._seat(rank) for rank in ranks])
        fields = places([json.loads(each)["node"] for each in said])
        self._write({self._place(rank): json.dumps(place) for rank, place in zip(ranks, fields, strict=True)})

    def _read(self, keys: list[str]) -> list[bytes]:
        """Values that are there; in one round trip where the store can."""
        store: Any = self.store  # torch's stubs do not know of what only some stores have
        if store.has_extended_api():
            found: list[bytes] = store.multi_get(keys)
            return found
        return [store.get(key) for key in keys]

    def _write(self, values: dict[str, str]) -> None:
        store: Any = self.store
        if store.has_extended_api():
            store.multi_set(list(values), list(values.values()))
        else:
            for key, value in values.items():
                store.set(key, value)

    def _present(self) -> dict[int, dict[str, str]]:
        seats = [self._seat(rank) for rank in range(self._topology.world_size)]
        taken = [rank for rank, seat in enumerate(seats) if self.store.check([seat])]
        return {rank: json.loads(self.store.get(seats[rank])) for rank in taken}

    def _missing(self) -> str:
        present = self._present()
        absent = [str(rank) for rank in range(self._topology.world_size) if rank not in present]
        arrived = ", ".join(f"{rank} ({who['host']}, process {who['pid']})" for rank, who in present.items())
        what = f"never came: rank {', '.join(absent)}" if absent else "all came, but not all became ready"
        return f"{len(present)} of {self._topology.world_size} ranks met in time; {what}. Here: rank {arrived}."

    @staticmethod
    def _seat(rank: int) -> str:
        return f"rank/{rank}"

    @staticmethod
    def _place(rank: int) -> str:
        return f"place/{rank}"
