"""Horovod's DistributedOptimizer, with the ways of a bare one."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.optim import Optimizer

from idist.backends.horovod.library import await_all, clear_errors
from idist.errors import ConfigError, UnknownArgument, did_you_mean


def distribute(hvd: Any, optimizer: Optimizer, options: dict[str, Any], timeout: timedelta) -> None:
    """Turn ``optimizer`` into Horovod's DistributedOptimizer of itself.

    It stays the same object: what a scheduler, a GradScaler or the user holds is the one that reduces.

    Raises:
        UnknownArgument: an option that Horovod's does not have.
        ConfigError: it is one already, a scheduler holds its bare ``step``, or Adasum is not built.
    """
    _check(hvd, optimizer, options)
    bare = type(optimizer)

    class Shared(bare):  # type: ignore[misc, valid-type]
        """Horovod makes an object of a class of its own, out of the parameters; let that be the one we have."""

        def __init__(self, params: Any) -> None:
            self.__dict__ = optimizer.__dict__

    Shared.__name__ = bare.__name__
    optimizer.__class__ = Shared
    try:
        made = type(hvd.DistributedOptimizer(optimizer, **options))
    except BaseException:
        optimizer.__class__ = bare
        raise
    optimizer.__class__ = made
    if options.get("op") is not hvd.Adasum:
        _reduce_after_backward(hvd, optimizer, timeout)


def load_state_of_rank_0(optimizer: Optimizer, exchange: Callable[[bytes], bytes]) -> None:
    """Give the optimizer the state of rank 0's.

    Not by Horovod's own function, which takes a step, with weight decay and all, to have a state to send.

    Args:
        exchange: returns what rank 0 has given to it.
    """
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    received = exchange(file.getvalue())
    # From rank 0 of this job; a state may hold anything, as an optimizer of the user's may put it there.
    state = torch.load(io.BytesIO(received), map_location="cpu", weights_only=False)
    optimizer.load_state_dict(state)


@contextmanager
def postponed(optimizer: Any) -> Iterator[None]:
    """A block of one backward pass that reduces nothing. It counts as one of ``backward_passes_per_step``."""
    delays = optimizer._allreduce_delay
    before = dict(delays)
    delays.update(dict.fromkeys(delays, sys.maxsize))
    try:
        yield
    finally:
        delays.update({parameter: max(delay - 1, 1) for parameter, delay in before.items()})


def _check(hvd: Any, optimizer: Optimizer, options: dict[str, Any]) -> None:
    known = list(signature(hvd.DistributedOptimizer).parameters)[1:]
    for name in options:
        if name not in known:
            raise UnknownArgument(f"auto_optim does not know the argument {name!r}.{did_you_mean(name, known)}")
    if hasattr(optimizer, "skip_synchronize"):
        raise ConfigError("the optimizer is Horovod's DistributedOptimizer already; auto_optim takes the bare one")
    if "step" in vars(optimizer):
        raise ConfigError(
            "the optimizer's step() has been replaced, as a learning rate scheduler does: make the scheduler after "
            "idist.auto_optim, or it would call a step() that reduces nothing"
        )
    if options.get("op") == hvd.Adasum and not hvd.mpi_enabled():
        raise ConfigError(
            "op=Adasum is not in this Horovod, which talks by Gloo: only one that was built with MPI, and was started "
            "by mpirun and hvd.init(), has it"
        )


def _reduce_after_backward(hvd: Any, optimizer: Any, timeout: timedelta) -> None:
    """Gradients are reduced when ``backward()`` returns, as with DistributedDataParallel.

    Horovod waits for them in ``step()``, which is too late for a closure, for GradScaler, which looks for
    overflow before, and for clipping, unless the user calls ``synchronize()``. That still works, and
    does nothing where nothing is left to do.
    """
    made = type(optimizer)
    bare: Any = made.__mro__[2]  # Horovod's class, Shared, and then the user's
    reduce = made.synchronize
    passing = -1

    def synchronize(self: Any) -> None:
        if not self._synchronized:
            _launch(self)
            await_all(hvd, [handle for handle, _ in self._handles.values() if isinstance(handle, int)], timeout)
            with clear_errors(hvd):
                reduce(self)

    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        if closure is None and self._should_synchronize:
            self.synchronize()
        self._synchronized = False
        value = bare.step(self) if closure is None else bare.step(self, closure)
        self._synchronized = False
        return value

    def zero_grad(self: Any, set_to_none: bool = True) -> None:
        under_way = [handle for handle, _ in self._handles.values() if isinstance(handle, int)]
        if under_way:  # of a pass that raised; Horovod would refuse the same names again before these have ended
            await_all(hvd, under_way, timeout)
        self._handles.clear()
        self.set_backward_passes_per_step(self.backward_passes_per_step)
        self._synchronized = False
        bare.zero_grad(self, set_to_none)

    def add_param_group(self: Any, param_group: dict[str, Any]) -> None:
        raise ConfigError("Horovod would not reduce the gradients of a parameter group that is added after auto_optim")

    def after_gradient(_: Tensor) -> None:
        nonlocal passing
        if optimizer._synchronized and optimizer.op != hvd.Average:
            raise ConfigError(
                "backward() was called again before optimizer.step() or optimizer.zero_grad(): gradients that have "
                "been reduced would be reduced once more. To add up several passes, use idist.accumulate, or pass "
                "backward_passes_per_step to auto_optim."
            )
        optimizer._synchronized = False
        # By the number of the pass, not by a flag: a pass that raises does not come to its end.
        if passing != torch._C._current_graph_task_id():
            passing = torch._C._current_graph_task_id()
            Variable._execution_engine.queue_callback(after_backward)

    def after_backward() -> None:
        if any(handle is not None for handle, _ in optimizer._handles.values()):
            optimizer.synchronize()

    step.hooked = True  # type: ignore[attr-defined] # torch would call the hooks of a step once more
    made.synchronize, made.step, made.zero_grad, made.add_param_group = synchronize, step, zero_grad, add_param_group
    for name in {"_allreduce_grad_async", "_grouped_allreduce_grad_async"} & set(dir(made)):  # called in backward()
        setattr(made, name, clear_errors(hvd)(getattr(made, name)))
    for parameter in optimizer._requires_update:
        parameter.register_post_accumulate_grad_hook(after_gradient)


def _launch(optimizer: Any) -> None:
    """Begin to reduce the gradients that no hook has begun with: this rank had no use for the parameter."""
    begun: set[Any] = set()
    for key, (handle, _) in optimizer._handles.items():
        if handle is not None:
            begun.update(key if isinstance(key, tuple) else (key,))
    for parameter in optimizer._requires_update - begun:
        optimizer._handles[parameter] = optimizer._allreduce_grad_async(parameter)
