"""What a backend is: a few tensor primitives and three wrap hooks. All else is derived from them."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from inspect import signature
from typing import Any, ClassVar, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Self

from idist.errors import ConfigError, UnknownArgument, did_you_mean
from idist.topology import Topology


def accelerator() -> torch.device | None:
    """The kind of accelerator of this machine, asked in a way that makes no context: one may fork afterwards."""
    device = torch.accelerator.current_accelerator()
    return device if device is not None and torch.get_device_module(device).device_count() > 0 else None


class Work(Protocol):
    """A primitive under way. ``torch.distributed.Work`` is one."""

    def wait(self) -> Any:
        """Wait until the tensors of the primitive can be used; raise what went wrong."""


class Done:
    """The work of a primitive that ended before it returned."""

    def wait(self) -> None:
        return None


DONE = Done()


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Some ranks of the job, in the order that collectives use.

    Attributes:
        ranks: the global ranks, each once.
        index: the place of this process among them, -1 if it is not a member.
        handle: what the backend's own library calls this group; ``None`` stands for the world.
        scratch: what the next collective in this group can use again.
    """

    ranks: tuple[int, ...]
    index: int
    handle: Any = None
    scratch: dict[Any, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def place(self, rank: int) -> int:
        """The place of a member, without going through thousands: in the world it is the rank itself."""
        return rank if rank < len(self.ranks) and self.ranks[rank] == rank else self.ranks.index(rank)


@dataclasses.dataclass(frozen=True, slots=True)
class Pending:
    """An operation that has begun on this rank and has not ended.

    Attributes:
        what: for example ``all_reduce of float32 2x3``.
        number: which one it is of those of its group on this rank.
        group: how the backend calls the group.
        ranks: the global ranks of the group.
    """

    what: str
    number: int
    group: str
    ranks: tuple[int, ...]


class Backend(ABC):
    """One way for ranks to talk.

    The primitives get contiguous, detached tensors that are on :meth:`device` already, of any
    dtype, and groups that this rank is a member of. They return a :class:`Work`.

    Attributes:
        name: as the user spells it, for example ``gloo`` or ``cpu:gloo,cuda:nccl``.
        model_name: ``serial``, ``native-dist``, ``xla-dist`` or ``horovod-dist``.
        launcher: what starts its processes where idist is asked to: ``multiprocessing``, or a
            program without which the backend's library connects nothing.
        library: the module that a user imports to start it without idist; none where that is a process
            group of torch, which is noticed without.
        model_stays: whether :meth:`wrap_model` returns the model itself, and its gradients are reduced all the same:
            by hooks of it, or by the optimizer of :meth:`wrap_optimizer`.
        rank_is_thread: whether this process has several ranks, of which the calling thread is one.
        rank: of this process; set by :meth:`start` or :meth:`attach`.
        world_size: of the job; likewise.
        timeout: of every collective, where it is known.
    """

    name: str
    model_name: str
    launcher: ClassVar[str] = "multiprocessing"
    library: ClassVar[str] = ""
    model_stays: ClassVar[bool] = False
    rank_is_thread: bool = False
    rank: int
    world_size: int
    timeout: timedelta | None = None

    # Life

    @classmethod
    @abstractmethod
    def names(cls) -> tuple[str, ...]:
        """The names that this class goes by on this installation of torch, usable or not."""

    @abstractmethod
    def __init__(self, name: str) -> None:
        """A backend that is not started. ConfigError if ``name`` is not one of this class."""

    @abstractmethod
    def unavailable_reason(self) -> tuple[str, str] | None:
        """``None`` if usable here and now, else (why not, what to do about it)."""

    @classmethod
    def started(cls) -> bool:
        """Whether ``library``, which has been imported, is in use; asked by every getter, so all but free."""
        return False

    @classmethod
    def attach(cls) -> Self | None:
        """Adopt what the user started with the backend's library, if there is anything. Never communicates."""
        return None

    @property
    def one_node(self) -> bool:
        """Whether an attached backend can tell, without asking them, that all ranks share this node."""
        return self.world_size == 1

    @abstractmethod
    def start(
        self,
        topology: Topology,
        *,
        timeout: timedelta | None,
        device: torch.device | None,
        **options: Any,
    ) -> Topology:
        """Connect the ranks; return the topology, complete now. All ranks, or none, get a context.

        Raises:
            LaunchError: the ranks did not meet in time; names those that are missing.
            ConfigError: the device or an option cannot be used.
        """

    @abstractmethod
    def stop(self) -> None:
        """Free what :meth:`start` made."""

    @abstractmethod
    def device(self) -> torch.device:
        """Where models are for training, and tensors for the primitives."""

    def device_for(self, tensor: Tensor) -> torch.device:
        """Where this tensor has to be for the primitives; a composite backend takes it where it is."""
        return self.device()

    def seed(self, seed: int) -> None:
        """Seed what draws random numbers on :meth:`device`, where ``torch.manual_seed`` does not."""

    def random_state(self) -> Any:
        """Of what draws random numbers on :meth:`device`, as plain data; ``None`` if that is the CPU."""
        device = self.device()
        return None if device.type == "cpu" else torch.get_device_module(device).get_rng_state()

    def set_random_state(self, state: Any) -> None:
        """Put back what :meth:`random_state` gave, here or, if it is of use, on another kind of device."""
        device = self.device()
        if device.type != "cpu" and isinstance(state, Tensor):
            torch.get_device_module(device).set_rng_state(state)

    # Primitives

    @abstractmethod
    def reduces(self, op: str, dtype: torch.dtype) -> bool:
        """Whether :meth:`all_reduce_` does this reduction; otherwise it is derived from a gather."""

    @abstractmethod
    def all_reduce_(self, tensor: Tensor, op: str, group: Group) -> Work:
        """Reduce in place."""

    @abstractmethod
    def all_gather_into(self, out: Tensor, tensor: Tensor, group: Group) -> Work:
        """``out`` is 1-d, holds ``group.size`` times the elements of the 1-d ``tensor``, by rank."""

    @abstractmethod
    def broadcast_(self, tensor: Tensor, src: int, group: Group) -> Work:
        """``tensor`` of global rank ``src`` in place of that of the others."""

    @abstractmethod
    def barrier(self, group: Group) -> None:
        """Return when every rank of the group has come here."""

    def new_group(self, ranks: tuple[int, ...], **options: Any) -> Any:
        """What the backend's library calls these ranks, in ascending order, some but not all of the world.

        Its members call this, and others may; it must not wait for others. The ranks themselves
        will do where the library has no groups of its own.
        """
        self._reject(options)
        return ranks

    def world(self) -> Any:
        """What the backend's library calls all ranks."""
        return tuple(range(self.world_size))

    def free_group(self, handle: Any) -> None:
        """Free what :meth:`new_group` made; only members call it."""

    def ranks_of(self, handle: Any) -> tuple[int, ...] | None:
        """The global ranks of a handle that the user made with the backend's library, else ``None``."""
        return None

    # Primitives that have a derived default: 1-d tensors, chunk i of group.size belongs to rank i

    def reduce_scatter_into(self, out: Tensor, tensor: Tensor, op: str, group: Group) -> Work:
        """Reduce; keep this rank's chunk."""
        reduced = tensor.clone()
        self.all_reduce_(reduced, op, group).wait()
        out.copy_(reduced.view(group.size, -1)[group.index])
        return DONE

    def all_to_all_into(self, out: Tensor, tensor: Tensor, group: Group) -> Work:
        """Chunk i goes to rank i, and chunk i comes from rank i."""
        everything = tensor.new_empty(group.size * tensor.numel())
        self.all_gather_into(everything, tensor, group).wait()
        out.view(group.size, -1).copy_(everything.view(group.size, group.size, -1)[:, group.index])
        return DONE

    def gather_into(self, out: Tensor | None, tensor: Tensor, dst: int, group: Group) -> Work:
        """As :meth:`all_gather_into`, but only global rank ``dst`` has an ``out``."""
        everything = tensor.new_empty(group.size * tensor.numel()) if out is None else out
        return self.all_gather_into(everything, tensor, group)

    def scatter_into(self, out: Tensor, tensor: Tensor | None, src: int, group: Group) -> Work:
        """Chunk i of the ``tensor`` that global rank ``src`` alone has goes to rank i."""
        everything = out.new_empty(group.size * out.numel()) if tensor is None else tensor.clone()
        self.broadcast_(everything, src, group).wait()
        out.copy_(everything.view(group.size, -1)[group.index])
        return DONE

    def supports(self, primitive: str) -> bool:
        """Whether a primitive that has a derived default is this backend's own."""
        return getattr(type(self), primitive) is not getattr(Backend, primitive)

    # What is under way, asked by a thread of its own every few seconds; see :mod:`idist.watch`

    def store(self) -> dist.Store | None:
        """A store that all ranks have in common; ``None``: there is none, and so no report of a hang."""
        return None

    def begun(self) -> dict[str, int]:
        """How many operations this rank has begun, by group; ``all`` is one, or the ranks with commas between."""
        return {}

    def pending(self) -> list[Pending] | None:
        """Operations that have not ended, the oldest first; ``None``: the backend does not know."""
        return None

    def traces_of_a_hang(self) -> str:
        """What else there is to look at after a hang."""
        return ""

    # Hooks

    @abstractmethod
    def wrap_model(self, model: torch.nn.Module, *, sync_bn: bool, **options: Any) -> torch.nn.Module:
        """The model on :meth:`device` already, with at least one trainable parameter, made to train
        on all ranks alike.
        """

    def shard_model(self, model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        """The model, as for :meth:`wrap_model`, with each rank holding a part of every parameter."""
        raise ConfigError(
            f"backend {self.name!r} does not shard models: strategy='fsdp' needs one of torch.distributed"
        )

    def no_sync(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """A block in which the backward pass leaves gradients as they are, for a later one to reduce all.

        Where the backend cannot, they are reduced every time: more work, the same gradients.
        """
        return nullcontext()

    def clip_grad_norm_(self, model: torch.nn.Module, max_norm: float, norm_type: float) -> Tensor:
        """Scale the gradients, those of all ranks, to this norm at most; returns what it was."""
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, norm_type)

    def wrap_optimizer(self, optimizer: Optimizer, **options: Any) -> Optimizer:
        """The optimizer, made to step with reduced gradients if wrapping the model did not do that."""
        self._reject(options)
        return optimizer

    def wrap_loader(self, loader: Iterable[Any]) -> Iterable[Any]:
        """The loader, made to feed :meth:`device` if a plain one does not.

        ``loader`` is the inner part of what :func:`idist.auto_dataloader` returns, with a length if its data have
        one. Each pass over it gives pairs, of a batch and of the position in the data after it: they may be read
        ahead, and come back in the same order with the tensors on the device and all else as it was.
        """
        return loader

    def _reject(self, options: dict[str, Any]) -> None:
        """Options are passed on from the user, so the last to take them has to refuse what is left."""
        for name in options:
            known = signature(self.start).parameters
            raise UnknownArgument(
                f"backend {self.name!r} does not know the option {name!r}.{did_you_mean(name, known)}"
            )
