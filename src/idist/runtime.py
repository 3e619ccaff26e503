"""The one current context: made by :func:`initialize`, adopted from the user, or serial.

Nothing here communicates except :func:`initialize`, :func:`sync` and :func:`place`.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import logging
import os
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch.distributed import distributed_c10d as c10d
from torch.distributed.distributed_c10d import GroupMember

from idist import backends, environments, failures
from idist.backends.base import Backend, Group, Work
from idist.backends.serial import Serial
from idist.errors import ConfigError, LaunchError, UnknownArgument
from idist.topology import SERIAL, Topology
from idist.watch import Watch

__all__ = ["Context", "current", "finalize", "get_local_rank", "initialize", "place", "set_local_rank", "start", "sync"]

logger = logging.getLogger("idist")


_LIBRARIES = {backend.library: backend for backend in backends.BUILTIN if backend.library}


def _library() -> str:
    """The library beside torch with which the user has started something; looks only at those that are imported."""
    for name, backend in _LIBRARIES.items():
        if name in sys.modules and backend.started():
            return name
    return ""


class _Unplaced:
    """Stands where the node fields would be, and says why there are none."""

    def __getattr__(self, name: str) -> NoReturn:
        raise LaunchError(
            "the process group was made by hand and no launcher's variables tell which ranks share a node. "
            "Call idist.sync() on every rank once (it exchanges the host names), or set LOCAL_RANK, "
            "LOCAL_WORLD_SIZE, GROUP_RANK and GROUP_WORLD_SIZE before the group is made."
        )


class Context:
    """A backend, this process's place in it, and what belongs to both.

    Attributes:
        owned: whether :func:`finalize` stops the backend, because we started it.
        verify: whether tensor collectives check that the ranks agree before the bytes move.
        groups: by their ranks; made once, freed with the context.
        known_groups: the same by what users have given for them, in any order.
        own_handles: the same by the identity of their handles, which this context keeps alive.
        native: whether the backend's primitive does a reduction of a type of tensor as it is.
        extra_groups: handles of the groups that were made with options, freed with the context too.
        everyone: the group of all ranks.
        nodes: the topology, where its node fields are known; else to ask for one is a LaunchError.
        neighbours: the global ranks of this node by local rank, once somebody has asked.
        world: the torch process group that was current when this context was last looked at: when
            another one is, or none, the user made or destroyed it.
        library: the one beside torch with which the user had started something then.
        bound_to_world: whether this context ends with that process group.
        watch: looks whether this rank hangs, if it may.
    """

    def __init__(self, backend: Backend, topology: Topology, *, owned: bool, verify: bool = False) -> None:
        self.backend = backend
        self.place(topology)
        self.rank = topology.rank
        self.world_size = topology.world_size
        self.owned = owned
        self.process = os.getpid()
        self.verify = verify
        self.everyone = Group(tuple(range(topology.world_size)), topology.rank)
        self.groups: dict[tuple[int, ...], Group] = {}
        self.known_groups: dict[tuple[int, ...] | range, Group] = {}
        self.own_handles: dict[int, Group] = {}
        self.native: dict[tuple[str, torch.dtype], bool] = {}
        self.extra_groups: list[Any] = []
        self.neighbours: tuple[int, ...] | None = None
        self.world: Any = GroupMember.WORLD
        self.library = "" if owned else _library()
        self.bound_to_world = not owned or self.world is not None
        self.watch: Watch | None = None

    def begin_to_watch(self, warn_after: float | None) -> None:
        """Have a hang reported, where there are other ranks and a way to ask them."""
        seconds = _warn_after_by_default() if warn_after is None else warn_seconds(warn_after)
        if seconds > 0 and self.world_size > 1 and self.backend.store() is not None:
            self.watch = Watch(
                self.backend, seconds, lambda: not self.bound_to_world or GroupMember.WORLD is self.world
            )

    def end_watch(self) -> None:
        """End its thread, if there is one."""
        if self.watch is not None:
            self.watch.stop()
            self.watch = None

    def place(self, topology: Topology) -> None:
        """Take this place, which may tell more than the one before."""
        self.topology = topology
        self.nodes: Any = topology if topology.placed else _Unplaced()

    def free_groups(self) -> None:
        """Free the groups that were made in this context; never communicates."""
        cached = [group.handle for group in self.groups.values() if group.index >= 0 and group is not self.everyone]
        for handle in [*cached, *self.extra_groups]:
            self.backend.free_group(handle)
        self.groups.clear()
        self.known_groups.clear()
        self.own_handles.clear()
        self.extra_groups.clear()


def _verify_by_default() -> bool:
    return os.environ.get("IDIST_VERIFY", "0") not in ("", "0")


_WARN_AFTER = "IDIST_WARN_AFTER"


def _warn_after_by_default() -> float:
    given = os.environ.get(_WARN_AFTER) or "30"
    with suppress(ValueError):
        return warn_seconds(float(given))
    raise ConfigError(f"{_WARN_AFTER} must be a number of seconds, 0 for never, got {given!r}")


def warn_seconds(warn_after: float) -> float:
    """A time as users give it; ConfigError if it is none."""
    if isinstance(warn_after, bool) or not isinstance(warn_after, (int, float)) or not 0 <= warn_after < float("inf"):
        raise ConfigError(f"warn_after must be a number of seconds, 0 for never, got {warn_after!r}")
    return float(warn_after)


def _serial() -> Context:
    return Context(Serial(), SERIAL, owned=False, verify=_verify_by_default())


_context = _serial()
_context.world = None
_of_threads: dict[int, Context] = {}
"""The contexts of ranks that are threads, by the thread. Mostly empty, which is asked faster than a threading.local."""
_local_rank_hint: int | None = None

at_end: list[Callable[[], None]] = []
"""What :func:`finalize` calls once, whichever context it then ends."""


def current() -> Context:
    """The context of this process, or of this thread where threads are ranks. Free: never communicates.

    Every getter and every collective begins here, so what is usual is asked first, and in the shortest way.
    """
    context = _of_threads.get(threading.get_ident(), _context) if _of_threads else _context
    try:
        world = c10d._world._default_pg  # GroupMember.WORLD, which is two properties, each a call
    except AttributeError:  # a world that somebody has put in the place of torch's
        world = GroupMember.WORLD
    if context.world is not world:
        return _refresh(context)
    if context.owned:
        return context
    for name in _LIBRARIES:
        if name in sys.modules and context.library != _library():
            return _refresh(context)
    return context


def initialize(
    backend: str | None = backends.AUTO,
    *,
    timeout: float | timedelta | None = None,
    init_method: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    device: str | torch.device | None = None,
    verify: bool | None = None,
    warn_after: float | None = None,
    **options: Any,
) -> None:
    """Connect this process with the other ranks of its job. Every rank calls it.

    Who and how many the ranks are comes from the launcher's variables, or from ``rank`` and
    ``world_size``. Without any of them this is a world of one process.

    Args:
        backend: a name of :func:`idist.available_backends`, a composite such as
            ``cpu:gloo,cuda:nccl``, ``"auto"`` for what suits the machine, ``None`` for not distributed.
        timeout: of the meeting and of every collective, in seconds; default: 5 minutes for the
            meeting and the backend's own for collectives.
        init_method: ``tcp://host:port`` or ``file:///shared/path``, instead of MASTER_ADDR and MASTER_PORT.
        rank: of this process, together with ``world_size``, instead of the launcher's variables.
        world_size: number of processes.
        device: to train on, instead of the one that the backend picks.
        verify: check before each tensor collective that the ranks agree; default: IDIST_VERIFY=1.
        warn_after: seconds that a rank may wait for others before one report tells where all ranks are; 0: never.
            Default: IDIST_WARN_AFTER, else 30; half the timeout, if that is less.
        **options: passed on to the backend; one that it does not know is an error.

    Raises:
        ConfigError: an argument is wrong, or a context exists already.
        BackendUnavailable: the backend exists but cannot be used here.
        LaunchError: the variables are half set, or the ranks did not meet in time; names the missing.

    Cost: no collective; a few round trips to the store.
    """
    topology, span = _topology_from(rank, world_size, os.environ), seconds(timeout)
    if backend is None:
        _refuse_to_be_quietly_alone(topology, options)
        return
    start(
        backends.create(backend),
        topology,
        timeout=span,
        device=device,
        verify=verify,
        warn_after=warn_after,
        **({} if init_method is None else {"init_method": init_method}),
        **options,
    )


def start(
    backend: Backend,
    topology: Topology,
    *,
    timeout: timedelta | None = None,
    device: str | torch.device | None = None,
    verify: bool | None = None,
    warn_after: float | None = None,
    **options: Any,
) -> None:
    """Start ``backend`` at this place and make it the current context; launchers call this in their processes.

    Raises:
        ConfigError, LaunchError: as :func:`initialize`; then nothing was started.
    """
    global _context
    context = current()
    if not isinstance(context.backend, Serial):
        whose = "idist.finalize() ends it" if context.owned else "you made it: use it as it is, or destroy it first"
        raise ConfigError(f"a {context.backend.name} context with {context.world_size} ranks exists already; {whose}")
    warn_after = _warn_after_by_default() if warn_after is None else warn_seconds(warn_after)
    if topology.world_size > 1:
        failures.show_causes_first()
    try:
        topology = backend.start(topology, timeout=timeout, device=as_device(device), **options)
    except BaseException:
        backend.stop()
        raise
    _context = Context(backend, topology, owned=True, verify=_verify_by_default() if verify is None else verify)
    _context.begin_to_watch(warn_after)


def finalize() -> None:
    """Stop what :func:`initialize` started and free all groups. A process group that the user made stays.

    Nothing to do, and no error, where nothing was initialised. Never communicates.
    """
    global _context, _local_rank_hint
    context = current()
    context.end_watch()
    context.free_groups()
    if threading.get_ident() in _of_threads:  # a rank that is a thread ends with its thread
        return
    _local_rank_hint = None
    while at_end:
        at_end.pop()()
    if context.owned:
        _context = _serial()
        try:
            context.backend.stop()
        finally:
            _context.world = None


# Libraries end their threads badly when the interpreter does it for them: torch aborts one exit in ten.
@atexit.register
def _at_exit() -> None:
    if _context.process == os.getpid():  # not in a forked process, whose parent goes on with it
        finalize()


def explain(error: BaseException) -> None:
    """Add to an error of a rank that has hung the report of that."""
    watch = current().watch
    if watch is not None:
        watch.explain(error)


def wait_for(work: Work) -> None:
    """Wait; what is raised then has the report of the hang, if there is one."""
    try:
        work.wait()
    except RuntimeError as error:
        explain(error)
        raise


def sync(temporary: bool = False) -> None:
    """Adopt a process group made by hand and learn which ranks share a node.

    A group is recognised without this call; only the node fields need it, where no launcher's
    variables tell them. All ranks call it.

    Args:
        temporary: accepted for users of the older API; getters are always up to date.

    Cost: one small all_gather, if the node fields are not known yet, else none.
    """
    place()


def place() -> Context:
    """The current context, with its node fields complete. All ranks call it.

    Cost: as :func:`sync`.
    """
    context = current()
    if not context.topology.placed:
        context.place(context.topology.place(_exchange_hosts(context)))
    return context


def set_local_rank(index: int) -> None:
    """Say which local rank this process has, where a process group made by hand and no variable tells it. Cost: none.

    Raises:
        ConfigError: not an integer of at least 0.
    """
    global _local_rank_hint
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise ConfigError(f"a local rank is an integer of at least 0, got {index!r}")
    _local_rank_hint = index


def get_local_rank() -> int:
    """Index of this process on its node. Cost: none.

    Raises:
        LaunchError: the process group was made by hand and nothing tells; :func:`idist.sync` finds out.
    """
    context = current()
    if _local_rank_hint is not None and not context.owned and context.world_size > 1:
        return _local_rank_hint
    return context.nodes.local_rank  # type: ignore[no-any-return]


@contextmanager
def thread_context(context: Context) -> Iterator[None]:
    """Make ``context`` that of the calling thread alone, which is a rank of its own."""
    context.bound_to_world = False
    _of_threads[threading.get_ident()] = context
    try:
        yield
    finally:
        context.end_watch()
        context.free_groups()
        del _of_threads[threading.get_ident()]


def _refresh(context: Context) -> Context:
    """The user made or destroyed a process group since ``context`` was made."""
    global _context
    if not context.bound_to_world:
        context.world, context.library = GroupMember.WORLD, _library()
        return context
    context.end_watch()
    adopted = next(filter(None, (cls.attach() for cls in backends.classes())), None)
    if adopted is None:
        _of_threads.pop(threading.get_ident(), None)
        _context = _serial()
        return _context
    context = Context(adopted, _observed(adopted, os.environ), owned=False, verify=_verify_by_default())
    if adopted.rank_is_thread:
        _of_threads[threading.get_ident()] = context
    else:
        _context = context
    context.begin_to_watch(None)
    return context


def _observed(backend: Backend, env: Mapping[str, str]) -> Topology:
    """The topology of a group that the user made: its own ranks, the nodes from the launcher, if it tells."""
    rank, world_size = backend.rank, backend.world_size
    by_hand = Topology(f"made by hand ({backend.name})", rank, world_size)
    try:
        told = environments.detect(env).topology
        if told.world_size == world_size > 1:
            if told.placed:
                return dataclasses.replace(told, rank=rank)
            by_hand = dataclasses.replace(by_hand, node=told.node)
    except LaunchError as error:
        logger.info("the variables of the launcher are not used: %s", error)
    return by_hand.place(["this node"] * world_size) if backend.one_node else by_hand


def _exchange_hosts(context: Context) -> list[str]:
    name = hashlib.sha256((context.topology.node or socket.gethostname()).encode()).digest()
    device = context.backend.device()
    mine = torch.frombuffer(bytearray(name), dtype=torch.uint8).to(device)
    out = torch.empty(context.world_size * mine.numel(), dtype=torch.uint8, device=device)
    wait_for(context.backend.all_gather_into(out, mine, context.everyone))
    return [bytes(row).hex() for row in out.view(context.world_size, -1).tolist()]


def _topology_from(rank: int | None, world_size: int | None, env: Mapping[str, str]) -> Topology:
    if (rank is None) != (world_size is None):
        raise ConfigError(f"rank and world_size belong together, got rank={rank!r}, world_size={world_size!r}")
    if rank is None or world_size is None:
        return detect(env)
    for name, value in (("rank", rank), ("world_size", world_size)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{name} must be an integer, got {value!r}")
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank must be between 0 and world_size - 1, got rank={rank}, world_size={world_size}")
    port = env.get("MASTER_PORT", "")
    return Topology(
        "arguments",
        rank,
        world_size,
        master_addr=env.get("MASTER_ADDR") or None,
        master_port=int(port) if port.isdecimal() else None,
        evidence=(f"rank={rank}", f"world_size={world_size}"),
    )


def detect(env: Mapping[str, str]) -> Topology:
    """The topology that the launcher's variables tell; hints about a likely slip are warnings.

    Raises:
        LaunchError: the variables are half set.
    """
    detection = environments.detect(env)
    for hint in detection.hints:
        warnings.warn(hint, stacklevel=4)
    return detection.topology


def _refuse_to_be_quietly_alone(topology: Topology, options: Mapping[str, Any]) -> None:
    if topology.world_size > 1:
        raise ConfigError(
            f"backend=None means not distributed, but {topology.environment} started {topology.world_size} processes: "
            "each would train a model of its own. Pass a backend ('auto' picks one), or start one process."
        )
    if options:
        raise UnknownArgument(f"backend=None takes no options, got {', '.join(sorted(options))}")


def seconds(timeout: float | timedelta | None) -> timedelta | None:
    """A timeout as users give it; ConfigError if it is none."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float, timedelta)):
        raise ConfigError(f"timeout must be a number of seconds or a timedelta, got {timeout!r}")
    try:
        span = timeout if isinstance(timeout, timedelta) else timedelta(seconds=timeout)
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"timeout must be a finite number of seconds, got {timeout!r}") from error
    if span <= timedelta(0):
        raise ConfigError(f"timeout must be more than 0 seconds, got {timeout!r}")
    return span


def as_device(device: str | torch.device | None) -> torch.device | None:
    """A device as users give it; ConfigError if it is none."""
    if device is None or isinstance(device, torch.device):
        return device
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device {device!r} is not a torch device: {error}") from None
