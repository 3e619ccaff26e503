"""Horovod: every byte moved by it, and its DistributedOptimizer; on its Gloo, whoever started the processes."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import Self

from idist import rendezvous
from idist.backends.base import Backend, Group, Work
from idist.backends.horovod import library
from idist.backends.horovod.process_sets import NON_MEMBER, ProcessSets
from idist.errors import ConfigError
from idist.topology import Topology

_NAME = "horovod"
# What it reduces by itself, https://horovod.readthedocs.io/en/stable/api.html#horovod.torch.allreduce; the rest is
# derived from a gather of bytes, and with that AND and OR, which it does not have.
_REDUCED = frozenset({torch.int32, torch.int64, torch.float16, torch.float32, torch.float64})
_OPS = {"SUM": "Sum", "MIN": "Min", "MAX": "Max", "PRODUCT": "Product"}


class Horovod(Backend):
    """Horovod, started by us, or by the user's own ``hvd.init()``."""

    model_name = "horovod-dist"
    library: ClassVar[str] = "horovod.torch"
    model_stays: ClassVar[bool] = True

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return (_NAME,)

    @staticmethod
    def installed() -> bool:
        """Whether this Python has a Horovod that was built for torch; imports nothing of it."""
        return library.installed() is not None

    def __init__(self, name: str) -> None:
        self.name = name
        self._device = torch.device("cpu")
        self._met: dist.Store | None = None
        self.timeout: timedelta = default_pg_timeout
        self._session: library.Session | None = None
        self._calls: Counter[tuple[int, ...]] = Counter()
        self._models = self._optimizers = 0
        self._parameters: Any = WeakIdKeyDictionary()
        self._steppers: Any = WeakIdKeyDictionary()

    # Life

    def unavailable_reason(self) -> tuple[str, str] | None:
        return library.problem()

    @classmethod
    def started(cls) -> bool:
        hvd = sys.modules.get(cls.library)
        return hvd is not None and bool(hvd.is_initialized())

    @classmethod
    def attach(cls) -> Self | None:
        if not cls.started():
            return None
        backend = cls(_NAME)
        hvd = backend._hvd = library.load()
        backend.rank, backend.world_size = hvd.rank(), hvd.size()
        backend._device = library.training_device(hvd, None, None)
        backend._sets = ProcessSets(hvd, backend.timeout)
        return backend

    @property
    def one_node(self) -> bool:
        return bool(self._hvd.local_size() == self.world_size)

    def start(
        self,
        topology: Topology,
        *,
        timeout: timedelta | None,
        device: torch.device | None,
        init_method: str | None = None,
        **options: Any,
    ) -> Topology:
        self._reject(options)
        hvd = self._hvd = library.load()
        self.timeout = timeout or default_pg_timeout

        def bind(placed: Topology) -> None:
            self._device = library.training_device(hvd, device, placed)

        def connect(store: dist.Store, placed: Topology) -> None:
            self._session = library.Session(hvd, store, placed, timeout)

        met = rendezvous.join(topology, _NAME, init_method=init_method, timeout=timeout, prepare=bind, connect=connect)
        assert self._session is not None
        self.rank, self.world_size = met.topology.rank, met.topology.world_size
        self._sets = ProcessSets(hvd, self.timeout, met.store, self.world_size)
        self._session.keep(met.server, self._sets)
        self._met = met.store
        return met.topology

    def stop(self) -> None:
        if self._session is not None:
            self._session.end()
            self._session = self._met = None

    def device(self) -> torch.device:
        return self._device

    # Primitives

    def reduces(self, op: str, dtype: torch.dtype) -> bool:
        return op in _OPS and dtype in _REDUCED

    def all_reduce_(self, tensor: Tensor, op: str, group: Group) -> Work:
        return self._call(group, self._hvd.allreduce_async_, tensor, op=getattr(self._hvd, _OPS[op]))

    def all_gather_into(self, out: Tensor, tensor: Tensor, group: Group) -> Work:
        return self._call(group, self._hvd.allgather_async, _wire(tensor), finish=_wire(out).copy_)

    def broadcast_(self, tensor: Tensor, src: int, group: Group) -> Work:
        return self._call(group, self._hvd.broadcast_async_, _wire(tensor), src)

    def reduce_scatter_into(self, out: Tensor, tensor: Tensor, op: str, group: Group) -> Work:
        if op != "SUM":
            return super().reduce_scatter_into(out, tensor, op, group)
        return self._call(group, self._hvd.reducescatter_async, tensor, op=self._hvd.Sum, finish=out.copy_)

    def all_to_all_into(self, out: Tensor, tensor: Tensor, group: Group) -> Work:
        def finish(received: tuple[Tensor, Tensor]) -> None:
            _wire(out).copy_(received[0])  # the second tells how much is from whom

        return self._call(group, self._hvd.alltoall_async, _wire(tensor), finish=finish)

    def barrier(self, group: Group) -> None:
        # Horovod's own barrier takes no name, and so would wait for ever after a call that only some ranks made.
        self.all_reduce_(torch.zeros(1, dtype=torch.int32), "SUM", group).wait()

    def new_group(self, ranks: tuple[int, ...], **options: Any) -> Any:
        """A process set of Horovod; ``NON_MEMBER`` on other ranks. All ranks call it if the user called ``hvd.init()``.

        Raises:
            ConfigError: Horovod was started by the user without process sets that can be added.
            PeerFailed: the others did not help to make it in time.
        """
        self._reject(options)
        return self._sets.of(ranks, member=self.rank in ranks)

    def world(self) -> Any:
        return self._hvd.global_process_set

    def ranks_of(self, handle: Any) -> tuple[int, ...] | None:
        if handle is NON_MEMBER:
            return ()
        return tuple(handle.ranks) if isinstance(handle, self._hvd.ProcessSet) else None

    # What is under way

    def store(self) -> dist.Store | None:
        return self._met

    def begun(self) -> dict[str, int]:
        names = {ranks: "all" if len(ranks) == self.world_size else ",".join(map(str, ranks)) for ranks in self._calls}
        # Those of Horovod's own optimizer are not ours to count, but we wait for them.
        return {names[ranks]: count for ranks, count in self._calls.items()} | library.WAITS

    # Hooks

    def wrap_model(self, model: torch.nn.Module, *, sync_bn: bool, **options: Any) -> torch.nn.Module:
        """The model itself, with the parameters and buffers of rank 0. Its optimizer reduces the gradients."""
        self._reject(options)
        if sync_bn:
            raise ConfigError(
                "sync_bn=True cannot be used with backend 'horovod': its SyncBatchNorm is a module of its own, for "
                "GPUs; put horovod.torch.SyncBatchNorm into the model where you want it"
            )
        for work in [self._from_rank_0(tensor.detach()) for tensor in chain(model.parameters(), model.buffers())]:
            work.wait()
        for name, parameter in model.named_parameters():
            if parameter not in self._parameters:
                guard = self._guard(parameter, name)
                self._parameters[parameter] = (f"model {self._models}: {name}", guard)
        self._models += 1
        return model

    def wrap_optimizer(self, optimizer: Optimizer, **options: Any) -> Optimizer:
        """The optimizer itself, turned into Horovod's DistributedOptimizer, with the state of rank 0.

        ``options`` are its arguments: ``compression``, ``backward_passes_per_step``, ``op``, ...
        """
        from idist.backends.horovod import optimizers

        options.setdefault("named_parameters", list(self._named(optimizer)))
        optimizers.distribute(self._hvd, optimizer, options, self.timeout)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._steppers[parameter] = weakref.ref(optimizer)
                _, guard = self._parameters.get(parameter, (None, None))
                if guard is not None:
                    guard.remove()
        if self.world_size > 1:
            optimizers.load_state_of_rank_0(optimizer, self._bytes_of_rank_0)
        self._optimizers += 1
        return optimizer

    @contextmanager
    def no_sync(self, model: torch.nn.Module) -> Iterator[None]:
        from idist.backends.horovod import optimizers

        with ExitStack() as stack:
            for optimizer in self._optimizers_of(model):
                stack.enter_context(optimizers.postponed(optimizer))
            yield

    def clip_grad_norm_(self, model: torch.nn.Module, max_norm: float, norm_type: float) -> Tensor:
        """With ``backward_passes_per_step``, a step of fewer passes has gradients that are not reduced yet."""
        for optimizer in self._optimizers_of(model):
            optimizer.synchronize()  # nothing, where nothing is left to do
        return super().clip_grad_norm_(model, max_norm, norm_type)

    # How

    def _optimizers_of(self, model: torch.nn.Module) -> list[Any]:
        found = [reference() for p in model.parameters() if (reference := self._steppers.get(p)) is not None]
        return list({id(optimizer): optimizer for optimizer in found if optimizer is not None}.values())

    def _call(
        self,
        group: Group,
        function: Callable[..., int],
        *args: Any,
        finish: Callable[[Any], object] | None = None,
        **options: Any,
    ) -> Work:
        """Call Horovod with the process set of the group, and a name that all its members find alike.

        Horovod matches the calls of ranks by name. One that it makes up counts all calls of a rank, so that after
        a call that only some ranks made the ranks wait for each other under different names for ever.
        """
        self._calls[group.ranks] += 1
        kind = "all" if group.size == self.world_size else ",".join(map(str, group.ranks))
        name = f"idist {kind} {self._calls[group.ranks]}"
        process_set = self._hvd.global_process_set if group.handle is None else group.handle
        with library.clear_errors(self._hvd):
            handle = function(*args, name=name, process_set=process_set, **options)
        return library.HorovodWork(self._hvd, handle, self.timeout, finish)

    @property
    def _everyone(self) -> Group:
        return Group(tuple(range(self.world_size)), self.rank)

    def _from_rank_0(self, tensor: Tensor) -> Work:
        flat = tensor.contiguous().view(-1)

        def finish(_: Tensor) -> None:
            tensor.copy_(flat.view(tensor.shape))

        return self._call(self._everyone, self._hvd.broadcast_async_, _wire(flat), 0, finish=finish)

    def _bytes_of_rank_0(self, mine: bytes) -> bytes:
        length = torch.tensor([len(mine)])
        self.broadcast_(length, 0, self._everyone).wait()
        content = torch.frombuffer(bytearray(mine), dtype=torch.uint8) if self.rank == 0 else None
        if content is None:
            content = torch.empty(int(length), dtype=torch.uint8)
        self.broadcast_(content, 0, self._everyone).wait()
        return content.numpy().tobytes()

    def _named(self, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
        """Every parameter with a name that no other has, the same on all ranks."""
        for i, group in enumerate(optimizer.param_groups):
            for j, parameter in enumerate(group["params"]):
                name, _ = self._parameters.get(parameter, (None, None))
                yield f"optimizer {self._optimizers}, {name or f'{i}.{j}'}", parameter

    def _guard(self, parameter: Tensor, name: str) -> Any:
        """Until an optimizer reduces it: nobody trains a model of his own without knowing."""
        if self.world_size == 1 or not parameter.requires_grad:
            return None

        def refuse(_: Tensor) -> None:
            raise ConfigError(
                f"the gradient of {name!r} stays on this rank: with Horovod it is the optimizer that reduces "
                "gradients. Pass the optimizer through idist.auto_optim before the first backward()."
            )

        return parameter.register_post_accumulate_grad_hook(refuse)


def _wire(tensor: Tensor) -> Tensor:
    """The same memory as bytes: Horovod refuses to move some types, and knows none of the newer ones."""
    return tensor.view(-1).view(torch.uint8)
