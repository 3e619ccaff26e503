"""Gradients of several backward passes, and their norm, right with every backend and strategy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from idist.errors import ConfigError
from idist.runtime import current

__all__ = ["MicroBatch", "accumulate", "clip_grad_norm_"]


@dataclasses.dataclass(frozen=True, slots=True)
class MicroBatch:
    """A batch's place among those whose gradients are added up.

    Attributes:
        scale: what to multiply its mean loss by, so that the sum is the mean over all of them.
        last: whether the gradients are complete after its backward pass, on all ranks: time for ``optimizer.step()``.
    """

    scale: float
    last: bool


@contextmanager
def accumulate(model: torch.nn.Module, step: int, *, every: int, total: int | None = None) -> Iterator[MicroBatch]:
    """Forward and backward of one of several batches that make one step of the optimizer.

    Only the last of them reduces gradients over the ranks, where the backend can leave it out before.

    ::

        for step, (x, y) in enumerate(loader):
            with idist.accumulate(model, step, every=4, total=len(loader)) as micro:
                (loss(model(x), y) * micro.scale).backward()
            if micro.last:
                optimizer.step()
                optimizer.zero_grad()

    Args:
        model: what :func:`auto_model` returned.
        step: how many batches of this pass came before; equal on all ranks.
        every: how many batches make a step.
        total: how many batches the pass has. Needed where ``every`` does not divide it: the last step is then made of
            those that are left, and without ``total`` their gradients are neither reduced nor scaled right.

    Raises:
        ConfigError: a number that cannot be.

    Cost: none of its own.
    """
    for name, value, least in (("step", step, 0), ("every", every, 1), ("total", total, step + 1)):
        if value is not None and (type(value) is not int or value < least):
            raise ConfigError(f"accumulate: {name} must be an integer of at least {least}, got {value!r}")
    first = step - step % every
    size = every if total is None else min(every, total - first)
    micro = MicroBatch(1 / size, step - first == size - 1)
    if micro.last:
        yield micro
    else:
        with current().backend.no_sync(model):
            yield micro


def clip_grad_norm_(model: torch.nn.Module, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale the gradients down, in place, if their norm is over ``max_norm``.

    It is the norm of the gradients of all ranks, reduced, also where each rank holds a part of them or the optimizer
    would reduce them later. All ranks call this, after the last backward pass of a step.

    Args:
        model: what :func:`auto_model` returned.
        max_norm: in units of ``norm_type``.
        norm_type: 2 for the Euclidean norm, ``inf`` for the largest element.

    Returns:
        The norm before, equal on all ranks.

    Shape: ``()``.

    Cost: none; one all_reduce for a sharded model; the reduction of the gradients, where it has not been yet.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html
    """
    return current().backend.clip_grad_norm_(model, max_norm, norm_type)
