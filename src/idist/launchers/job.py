"""What to start, checked before anything starts."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch

from idist import backends, environments
from idist.backends.base import Backend
from idist.errors import ConfigError, UnknownArgument, did_you_mean
from idist.rendezvous import DEFAULT_TIMEOUT
from idist.runtime import as_device, seconds, warn_seconds
from idist.topology import Topology

START_METHODS = ("forkserver", "spawn", "fork")
_LAST_PORT = 2**16 - 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The processes to start on this node, and how they find the other nodes.

    Attributes:
        backend: not started; the processes make their own by its name.
        master_addr: with ``master_port``, where rank 0 serves the rendezvous; ``None``: it is
            served here, on the loopback interface, or it is a file.
        start_method: of :mod:`multiprocessing`; ``None``: what suits the function.
        options: what else ``runtime.start`` gets.
    """

    backend: Backend
    nproc_per_node: int
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    master_port: int | None = None
    start_method: str | None = None
    daemon: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def ranks(self) -> range:
        """The ranks of this node."""
        first = self.node_rank * self.nproc_per_node
        return range(first, first + self.nproc_per_node)

    @property
    def timeout(self) -> timedelta:
        """How long the processes may wait for each other."""
        given: timedelta = self.options.get("timeout", DEFAULT_TIMEOUT)
        return given

    @property
    def serves_here(self) -> bool:
        """Whether the ranks meet at a store that we serve, for this node alone."""
        return self.master_addr is None and "init_method" not in self.options

    def topology(self, rank: int) -> Topology:
        """The place of one of :attr:`ranks`; where the rendezvous is served here, without its address."""
        return Topology(
            "spawn",
            rank=rank,
            world_size=self.nnodes * self.nproc_per_node,
            local_rank=rank - self.ranks.start,
            nproc_per_node=self.nproc_per_node,
            node_rank=self.node_rank,
            nnodes=self.nnodes,
            master_addr=self.master_addr,
            master_port=self.master_port,
            evidence=(f"nproc_per_node={self.nproc_per_node}", f"nnodes={self.nnodes}", f"node_rank={self.node_rank}"),
        )


def plan(
    backend: str | None,
    env: Mapping[str, str],
    /,
    *,
    nproc_per_node: int,
    nnodes: int | None = None,
    node_rank: int | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
    init_method: str | None = None,
    start_method: str | None = None,
    daemon: bool = False,
    join: bool = True,
    timeout: float | timedelta | None = None,
    device: str | torch.device | None = None,
    warn_after: float | None = None,
    **options: Any,
) -> Job:
    """Check the arguments of :class:`idist.Parallel` that start processes; see there.

    Raises:
        ConfigError: one of them is wrong, or a launcher has started several processes already.
        BackendUnavailable: the backend cannot be used here.
    """
    if backend is None:
        raise ConfigError(
            f"backend=None means not distributed, but nproc_per_node={nproc_per_node!r} was given. "
            "Pass backend='auto' for what suits this machine, or leave nproc_per_node out."
        )
    nproc_per_node = _integer("nproc_per_node", nproc_per_node, at_least=1)
    refuse_second_launch(nproc_per_node, env)
    found = backends.create(backend)
    if found.launcher != Backend.launcher:
        _refuse_placing(
            found,
            nnodes=None if nnodes == 1 else nnodes,
            node_rank=None if node_rank == 0 else node_rank,
            master_addr=master_addr,
            master_port=master_port,
            init_method=init_method,
            start_method=start_method,
        )
    nnodes, node_rank = _nodes(nnodes, node_rank)
    address = _meeting_point(nnodes, master_addr, master_port, init_method, env)
    if start_method is not None and start_method not in START_METHODS:
        raise ConfigError(f"start_method {start_method!r} is unknown; expected one of {', '.join(START_METHODS)}")
    if join is not True:
        raise ConfigError("join=False is not supported: run returns what the function returned; call it in a thread")
    refuse_unknown(options, found)
    warned = None if warn_after is None else warn_seconds(warn_after)
    given = {
        "timeout": seconds(timeout),
        "device": as_device(device),
        "warn_after": warned,
        **options,
        **address.options,
    }
    return Job(
        backend=found,
        nproc_per_node=nproc_per_node,
        nnodes=nnodes,
        node_rank=node_rank,
        master_addr=address.host,
        master_port=address.port,
        start_method=start_method,
        daemon=bool(daemon),
        options={name: value for name, value in given.items() if value is not None},
    )


def refuse_second_launch(nproc_per_node: int, env: Mapping[str, str]) -> None:
    """A launcher's processes must not start processes of their own: they would be told the same ranks.

    One process on its own may: a shell inside an allocation looks like a launched task.
    """
    topology = environments.detect(env).topology
    if topology.world_size > 1:
        raise ConfigError(
            f"nproc_per_node={nproc_per_node} asks for processes to be started here, but {topology.environment} has "
            f"started {topology.world_size} already ({', '.join(topology.evidence)}): there would be "
            f"{topology.world_size} x {nproc_per_node}. Leave nproc_per_node out to use those of the launcher, "
            "or run the script with plain python."
        )


def _refuse_placing(backend: Backend, **placing: object) -> None:
    """A program that starts the processes decides where they run and how they meet."""
    for name, value in placing.items():
        if value is not None:
            raise ConfigError(
                f"{name}={value!r} cannot be used with backend {backend.name!r}, whose processes {backend.launcher} "
                f"starts and places, here all of them on this node. To place them yourself, for example on several "
                f"nodes, start the script with {backend.launcher} and leave nproc_per_node out."
            )


@dataclasses.dataclass(frozen=True, slots=True)
class _Address:
    host: str | None = None
    port: int | None = None
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _nodes(nnodes: int | None, node_rank: int | None) -> tuple[int, int]:
    if nnodes is None:
        if node_rank not in (None, 0):
            raise ConfigError(f"node_rank={node_rank!r} was given without nnodes")
        return 1, 0
    count = _integer("nnodes", nnodes, at_least=1)
    if node_rank is None:
        if count > 1:
            raise ConfigError(f"nnodes={count} needs node_rank, the index of this node: 0 to {count - 1}")
        return count, 0
    index = _integer("node_rank", node_rank, at_least=0)
    if index >= count:
        raise ConfigError(f"node_rank must be 0 to {count - 1} with nnodes={count}, got {index}")
    return count, index


def _meeting_point(
    nnodes: int, host: str | None, port: int | None, init_method: str | None, env: Mapping[str, str]
) -> _Address:
    """Where the ranks meet: nowhere in particular, if all of them are on this node."""
    if init_method in (None, "env://"):
        if init_method is not None:
            host, port = _from_variables(host, port, env)
        return _given_address(nnodes, host, port)
    if host is not None or port is not None:
        raise ConfigError(
            f"init_method={init_method!r} already says where the ranks meet; "
            f"leave out master_addr={host!r} and master_port={port!r}"
        )
    return _parsed_address(init_method)


def _given_address(nnodes: int, host: str | None, port: int | None) -> _Address:
    if nnodes > 1 and (host is None or port is None):
        raise ConfigError(
            f"nnodes={nnodes} needs master_addr and master_port, the host of node 0 and a free port there, "
            f"or init_method; got master_addr={host!r}, master_port={port!r}"
        )
    if host is not None and port is None:
        raise ConfigError(f"master_addr={host!r} needs a master_port too; on one node both can be left out")
    if port is None:
        return _Address()
    if host is not None and (not isinstance(host, str) or not host):
        raise ConfigError(f"master_addr must be a host name or an address, got {host!r}")
    return _Address(host or "127.0.0.1", _port(port))


def _from_variables(host: str | None, port: int | None, env: Mapping[str, str]) -> tuple[str | None, int | None]:
    told = env.get("MASTER_PORT", "")
    if port is None and told:
        if not told.isdecimal():
            raise ConfigError(f"MASTER_PORT={told!r} is not a port")
        port = int(told)
    return host or env.get("MASTER_ADDR") or None, port


def _parsed_address(init_method: Any) -> _Address:
    expected = "expected tcp://host:port, file:///path/that/all/nodes/share or env://"
    if not isinstance(init_method, str):
        raise ConfigError(f"init_method must be a string, got {init_method!r}; {expected}")
    url = urlsplit(init_method)
    if url.scheme == "file" and url.path:
        return _Address(options={"init_method": init_method})
    try:
        host, port = (url.hostname, url.port) if url.scheme == "tcp" else (None, None)
    except ValueError:  # a port that is none
        host = port = None
    if host is None or port is None:
        raise ConfigError(f"init_method {init_method!r} cannot be used; {expected}")
    return _Address(host, _port(port))


def refuse_unknown(options: Mapping[str, Any], backend: Backend) -> None:
    """A backend names its options as parameters of ``start``: what it does not name, it would refuse anyway.

    Raises:
        UnknownArgument: neither it nor :class:`idist.Parallel` knows one of them.
    """
    parameters = inspect.signature(backend.start).parameters.values()
    known = {parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY}
    ours = inspect.signature(plan).parameters
    allowed = (known | set(ours) | {"verify"}) - {"backend", "env", "options"}
    for name in options:
        if name not in allowed:
            expected = ", ".join(sorted(allowed))
            raise UnknownArgument(
                f"unknown argument {name!r}; expected some of {expected}.{did_you_mean(name, allowed)}"
            )


def _integer(name: str, value: object, *, at_least: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or number < at_least:
        raise ConfigError(f"{name} must be an integer of at least {at_least}, got {value!r}")
    return number


def _port(value: object) -> int:
    port = _integer("master_port", value, at_least=1)
    if port > _LAST_PORT:
        raise ConfigError(f"master_port must be 1 to {_LAST_PORT}, got {port}")
    return port
