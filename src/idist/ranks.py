"""Where this process stands, and work that one rank does for all."""

from __future__ import annotations

import functools
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from idist import backends, collectives, groups, runtime
from idist.backends.base import Group
from idist.errors import ConfigError, PeerFailed
from idist.runtime import Context, current, get_local_rank
from idist.topology import Topology

__all__ = [
    "available_backends",
    "backend",
    "device",
    "get_local_rank",
    "get_nnodes",
    "get_node_rank",
    "get_nproc_per_node",
    "get_rank",
    "get_topology",
    "get_world_size",
    "hostname",
    "model_name",
    "one_rank_first",
    "one_rank_only",
    "show_config",
]

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("idist")


def get_rank() -> int:
    """Index of this process in the job. Cost: none."""
    return current().rank


def get_world_size() -> int:
    """Number of processes of the job. Cost: none."""
    return current().world_size


def get_nproc_per_node() -> int:
    """Number of processes of the job on this node. Cost and errors: as :func:`get_local_rank`."""
    return current().nodes.nproc_per_node  # type: ignore[no-any-return]


def get_nnodes() -> int:
    """Number of nodes of the job. Cost and errors: as :func:`get_local_rank`."""
    return current().nodes.nnodes  # type: ignore[no-any-return]


def get_node_rank() -> int:
    """Index of this node in the job. Cost and errors: as :func:`get_local_rank`."""
    return current().nodes.node_rank  # type: ignore[no-any-return]


def get_topology() -> Topology:
    """All that is known of this process's place: its environment, the master's address, the evidence. Cost: none."""
    return current().topology


def backend() -> str | None:
    """Name of the backend, None where the process is on its own. Cost: none."""
    context = current()
    return None if context.backend.model_name == "serial" else context.backend.name


def model_name() -> str:
    """Kind of the backend: serial, native-dist, xla-dist or horovod-dist. Cost: none."""
    return current().backend.model_name


def device() -> torch.device:
    """Device to train on: with nccl the CUDA device of the local rank, with gloo the CPU. Cost: none."""
    return current().backend.device()


def hostname() -> str:
    """Name of this node. Cost: none."""
    return socket.gethostname()


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can be used on this machine, composites aside. Cost: none."""
    return backends.available()


def show_config() -> None:
    """Log the context at level INFO, as logger ``idist``. Cost: none."""
    context = current()
    topology = context.topology
    logger.info("distributed configuration: %s", context.backend.model_name)
    logger.info("backend: %s", backend())
    logger.info("device: %s", context.backend.device())
    logger.info("hostname: %s", hostname())
    logger.info("environment: %s", topology.environment)
    logger.info("world size: %s", topology.world_size)
    logger.info("rank: %s", topology.rank)
    if topology.placed:
        logger.info("local rank: %s", get_local_rank())
        logger.info("num processes per node: %s", topology.nproc_per_node)
        logger.info("num nodes: %s", topology.nnodes)
        logger.info("node rank: %s", topology.node_rank)


def one_rank_only(rank: int = 0, with_barrier: bool = False) -> Callable[[Callable[P, R]], Callable[P, R | None]]:
    """Decorate a function so that one rank alone runs it; the others return None at once.

    Args:
        rank: the global rank.
        with_barrier: the others wait for it, and raise if it does.

    Raises:
        ConfigError: no rank of this job, when the function is called.
        PeerFailed: with ``with_barrier``, the function raised on its rank; there its own error is raised.

    Cost: none; with ``with_barrier`` one all_gather of 256 bytes.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R | None]:
        @functools.wraps(function)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> R | None:
            context = current()
            _check_rank(rank, context.world_size)
            if not with_barrier:
                return function(*args, **kwargs) if context.rank == rank else None
            if context.rank != rank:
                _hear(context, context.everyone, rank, function.__qualname__)
                return None
            with _leading(context, context.everyone, rank):
                return function(*args, **kwargs)

        return wrapper

    return decorate


@contextmanager
def one_rank_first(rank: int = 0, local: bool = False) -> Iterator[None]:
    """One rank runs the block before the others do; for example it downloads what they then read.

    Args:
        rank: the global rank, or the local one with ``local``.
        local: one rank of each node goes first, and its node's ranks wait for it.

    Raises:
        ConfigError: there is no such rank.
        PeerFailed: the first rank raised; there its own error is raised. The others do not run the block.

    Cost: one all_gather of 256 bytes; with ``local`` another one at its first use.
    """
    context = current()
    if local:
        neighbours = _neighbours(context)
        _check_rank(rank, len(neighbours), "local rank")
        group, leader = groups.resolve(context, neighbours), neighbours[rank]
    else:
        group, leader = context.everyone, rank
        _check_rank(rank, context.world_size)
    if context.rank == leader:
        with _leading(context, group, leader):
            yield
    else:
        _hear(context, group, leader, "one_rank_first")
        yield


@contextmanager
def _leading(context: Context, group: Group, leader: int) -> Iterator[None]:
    """Whatever ends the block, the ranks that wait hear of it."""
    failure: str | None = "it ended without a word"
    try:
        yield
        failure = None
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"
        raise
    finally:
        collectives.outcome(context, group, leader, failure)


def _hear(context: Context, group: Group, leader: int, what: str) -> None:
    failure = collectives.outcome(context, group, leader, None)
    if failure is not None:
        raise PeerFailed(f"rank {leader} failed in {what}: {failure}")


def _neighbours(context: Context) -> tuple[int, ...]:
    """The global ranks of this node by local rank. Asked once: no variable tells which ranks share a node."""
    if context.neighbours is None:
        topology = runtime.place().topology
        places = collectives.all_gather((topology.node_rank, topology.local_rank))
        here = [(local, rank) for rank, (node, local) in enumerate(places) if node == topology.node_rank]
        context.neighbours = tuple(rank for _, rank in sorted(here))
    return context.neighbours


def _check_rank(rank: int, size: int, what: str = "rank") -> None:
    if type(rank) is not int or not 0 <= rank < size:
        raise ConfigError(f"{what} must be an integer between 0 and {size - 1}, got {rank!r}")
