"""XLA, for TPUs: by torch_xla, with every collective in a program of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Self

from idist.backends.base import DONE, Backend, Group, Work
from idist.backends.xla import library
from idist.errors import ConfigError
from idist.topology import Topology

if TYPE_CHECKING:
    from idist.backends.xla.training import Averaging

_NAME = "xla-tpu"
_OPS = {"SUM": "sum", "PRODUCT": "mul", "MIN": "min", "MAX": "max"}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_REDUCED = frozenset({*_INTEGERS.values(), torch.int8, torch.float16, torch.float32, torch.float64})


class Xla(Backend):
    """The ranks of XLA's runtime: of torch_xla.launch, or this process alone.

    Ranks run programs, and those that communicate have to be the same on all of them. So everything that this rank
    has computed so far is run first, then the collective as a program of its own.
    """

    model_name = "xla-dist"
    launcher: ClassVar[str] = "torch_xla.launch"
    library: ClassVar[str] = "torch_xla"
    model_stays: ClassVar[bool] = True

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return (_NAME, "xla")

    @staticmethod
    def installed() -> bool:
        """Whether this Python has torch_xla; imports nothing of it."""
        return library.installed()

    def __init__(self, name: str) -> None:
        self.name = _NAME
        self._device = torch.device("cpu")
        self._joined = False
        self._averaging: WeakKeyDictionary[torch.nn.Module, Averaging] = WeakKeyDictionary()

    # Life

    def unavailable_reason(self) -> tuple[str, str] | None:
        return library.problem()

    @classmethod
    def started(cls) -> bool:
        return library.has_ranks()

    @classmethod
    def attach(cls) -> Self | None:
        if not cls.started():
            return None
        backend = cls(_NAME)
        backend._bind()
        return backend

    @property
    def one_node(self) -> bool:
        return bool(self._runtime.local_device_count() == self.world_size)

    def start(
        self, topology: Topology, *, timeout: timedelta | None, device: torch.device | None, **options: Any
    ) -> Topology:
        """``timeout`` has no effect: XLA's collectives have none."""
        self._reject(options)
        if device is not None and device.type != "xla":
            raise ConfigError(f"device {str(device)!r} cannot be used with backend {_NAME!r}: leave it out")
        library.load()
        if topology.world_size > 1:
            library.join(topology)
            self._joined = True
        self._bind()
        return dataclasses.replace(topology, rank=self.rank)

    def stop(self) -> None:
        if self._joined:
            self._joined = False
            library.leave()

    def _bind(self) -> None:
        import torch_xla
        import torch_xla.core.xla_model as xm
        from torch_xla import runtime

        self._torch_xla, self._xm, self._runtime = torch_xla, xm, runtime
        self._device = torch_xla.device()
        self.rank, self.world_size = runtime.global_ordinal(), runtime.world_size()
        self.rank_is_thread = runtime.addressable_device_count() > 1
        # The compiler of the CPU client stops at a bfloat16 that is reduced.
        self._reduced = _REDUCED if runtime.device_type() == "CPU" else _REDUCED | {torch.bfloat16}

    def device(self) -> torch.device:
        return self._device

    def seed(self, seed: int) -> None:
        self._xm.set_rng_state(seed, str(self._device))

    def random_state(self) -> Any:
        return self._xm.get_rng_state(str(self._device))

    def set_random_state(self, state: Any) -> None:
        if isinstance(state, int):
            self.seed(state)

    # Primitives

    def reduces(self, op: str, dtype: torch.dtype) -> bool:
        return op in _OPS and dtype in self._reduced

    def all_reduce_(self, tensor: Tensor, op: str, group: Group) -> Work:
        [reduced] = self._run(lambda values: self._reduced_over(group, values, op), [tensor])
        tensor.copy_(reduced)
        return DONE

    def all_gather_into(self, out: Tensor, tensor: Tensor, group: Group) -> Work:
        mine = self._mask(group, group.index).view(-1, 1)

        def gather(values: list[Tensor]) -> list[Tensor]:
            words = _words(values[0])
            if group.size == self.world_size:
                return [self._xm.all_gather(words, pin_layout=False)]
            # XLA's own wants groups that are all of one size.
            return self._reduced_over(group, [torch.where(mine, words, torch.zeros_like(words)).view(-1)])

        if tensor.numel():
            [gathered] = self._run(gather, [tensor])
            out.copy_(_from_words(gathered, out))
        return DONE

    def broadcast_(self, tensor: Tensor, src: int, group: Group) -> Work:
        self._broadcast([tensor], src, group)
        return DONE

    def barrier(self, group: Group) -> None:
        self.all_reduce_(torch.zeros(1, dtype=torch.int32, device=self._device), "SUM", group)
        self._torch_xla.sync(wait=True)

    # Hooks

    def wrap_model(self, model: torch.nn.Module, *, sync_bn: bool, **options: Any) -> torch.nn.Module:
        """The model itself, with rank 0's parameters and buffers; each backward pass ends by averaging gradients."""
        from idist.backends.xla.training import Averaging

        self._reject(options)
        if sync_bn and self.world_size > 1:
            raise ConfigError(f"sync_bn=True cannot be used with backend {_NAME!r}: torch has it for process groups")
        if model in self._averaging:
            raise ConfigError("auto_model has had this model before: its gradients would be averaged twice")
        self._broadcast([tensor.detach() for tensor in chain(model.parameters(), model.buffers())], 0, self._everyone)
        self._averaging[model] = Averaging(model, self._average)
        return model

    def no_sync(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        averaging = self._averaging.get(model)
        return nullcontext() if averaging is None else averaging.paused()

    def wrap_optimizer(self, optimizer: Optimizer, **options: Any) -> Optimizer:
        """The optimizer itself; each step ends by running what was computed for it."""
        self._reject(options)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.device.type != self._device.type:
                    raise ConfigError(
                        f"the optimizer has a parameter on {parameter.device}, and the model is on {self._device}: "
                        "moved there, it has other parameters. Make the optimizer after idist.auto_model."
                    )
        optimizer.register_step_post_hook(lambda *_: self._torch_xla.sync())
        return optimizer

    def wrap_loader(self, loader: Iterable[Any]) -> Iterable[Any]:
        from idist.backends.xla.training import Feed

        return Feed(loader, self._device, self._torch_xla.sync)

    # How

    def _run(self, collective: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]) -> list[Tensor]:
        """What it makes of the contents of ``inputs``, in a program of its own.

        It gets copies: a view of another tensor would bring that into the program.
        """
        copies = [tensor.clone() for tensor in inputs]
        self._torch_xla.sync()
        results = collective(copies)
        self._torch_xla.sync()
        return results

    def _reduced_over(self, group: Group, values: list[Tensor], op: str = "SUM", scale: float = 1.0) -> list[Tensor]:
        """The values, reduced in place. XLA has to know a group of every rank; those of others need not take part."""
        others = [[rank] for rank in range(self.world_size) if rank not in group.ranks]
        groups = [list(group.ranks), *others] if others else None
        if filled := [value for value in values if value.numel()]:
            self._xm.all_reduce(_OPS[op], filled, scale=scale, groups=groups)
        return values

    def _broadcast(self, tensors: list[Tensor], src: int, group: Group) -> None:
        """By adding zeros to it, as integers: a float is changed by that if it is -0.0 or not a number."""
        mine = self._mask(group, group.ranks.index(src))[group.index]

        def send(values: list[Tensor]) -> list[Tensor]:
            words = [_words(value) for value in values]
            return self._reduced_over(group, [torch.where(mine, word, torch.zeros_like(word)) for word in words])

        for tensor, words in zip(tensors, self._run(send, tensors), strict=True):
            tensor.copy_(_from_words(words, tensor))

    def _mask(self, group: Group, index: int) -> Tensor:
        """Truth at one place of the group: data, as a constant would make a program of its own on each rank."""
        return torch.tensor([place == index for place in range(group.size)]).to(self._device)

    @property
    def _everyone(self) -> Group:
        return Group(tuple(range(self.world_size)), self.rank)

    def _average(self, gradients: list[Tensor]) -> None:
        # Autograd calls this, in a thread of its own, which has to be told the device that its programs are for.
        self._torch_xla.device(self._device.index)

        def average(values: list[Tensor]) -> list[Tensor]:
            wide = [value if self.reduces("SUM", value.dtype) else value.float() for value in values]
            return self._reduced_over(self._everyone, wide, scale=1 / self.world_size)

        for gradient, averaged in zip(gradients, self._run(average, gradients), strict=True):
            gradient.copy_(averaged)


def _words(tensor: Tensor) -> Tensor:
    """The same bits as integers, in one dimension."""
    if tensor.dtype is torch.bool:
        return tensor.to(torch.uint8).view(-1)
    parts = torch.view_as_real(tensor) if tensor.dtype is torch.complex128 else tensor
    return parts.reshape(-1).view(_INTEGERS[parts.dtype.itemsize])


def _from_words(words: Tensor, like: Tensor) -> Tensor:
    """The opposite of :func:`_words`, with the type and shape of ``like``."""
    if like.dtype is torch.bool:
        return words.to(torch.bool).view(like.shape)
    if like.dtype is torch.complex128:
        return torch.view_as_complex(words.view(torch.float64).view(*like.shape, 2))
    return words.view(like.dtype).view(like.shape)
