"""``auto_model``: the model, ready to train on all ranks alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from idist.errors import ConfigError, did_you_mean
from idist.runtime import current

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from idist.backends.fsdp import Wrap

__all__ = ["auto_model"]

_STRATEGIES = ("ddp", "fsdp", "none")


@overload
def auto_model(
    model: torch.nn.Module,
    sync_bn: bool = False,
    *,
    strategy: Literal["fsdp"],
    wrap: Wrap = ...,
    mixed_precision: torch.dtype | MixedPrecisionPolicy | None = None,
    cpu_offload: bool = False,
    reshard_after_forward: bool | int | None = None,
) -> torch.nn.Module: ...
@overload
def auto_model(
    model: torch.nn.Module, sync_bn: bool = False, *, strategy: Literal["ddp", "none"] = "ddp", **kwargs: Any
) -> torch.nn.Module: ...
@overload
def auto_model(model: torch.nn.Module, sync_bn: bool = False, *, strategy: str) -> torch.nn.Module: ...
def auto_model(
    model: torch.nn.Module, sync_bn: bool = False, *, strategy: str = "ddp", **kwargs: Any
) -> torch.nn.Module:
    """Move a model to the device and let the backend wrap it, so that the ranks train one model.

    Parameters and buffers move. A model without trainable parameters has nothing to synchronise
    and comes back as it is. Models from ``torch.compile`` or apex, native AMP and GradScaler work
    as they do with the wrapper that the backend uses.

    Args:
        model: on any device.
        sync_bn: with several ranks, batch norm layers use the statistics of all ranks.
        strategy: ``ddp``: every rank has the whole model and gradients are averaged. ``fsdp``: each rank holds a
            part of every parameter, its gradient and the optimizer's states (FSDP2), for models that are too large
            for one device; make the optimizer after it. ``none``: the ranks train models of their own.
        **kwargs: for ``ddp`` those of the backend's wrapper, for example ``find_unused_parameters`` for
            DistributedDataParallel. For ``fsdp``: ``wrap``, which modules are gathered one at a time: a class or
            several, at least so many parameters (default: 1,000,000), or a function of the module;
            ``mixed_precision``: a type to compute in, such as ``torch.bfloat16``, or torch's policy;
            ``cpu_offload``: keep all in the memory of the CPU; ``reshard_after_forward`` as in torch's ``fully_shard``.

    Returns:
        The wrapped model; with ``fsdp``, ``none``, or without other ranks and other devices, ``model`` itself.

    Raises:
        TypeError: not a model, or a keyword that the wrapper does not take.
        ConfigError: an unknown strategy, or one that the backend does not have; or the backend returned a trainable
            model without gradient synchronisation.

    Cost: that of the wrapper: DistributedDataParallel compares the parameters' shapes and broadcasts
    parameters and buffers of rank 0; ``fsdp`` broadcasts each of them.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html,
    https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"auto_model takes a torch.nn.Module, got {type(model).__name__}")
    if strategy not in _STRATEGIES:
        raise ConfigError(
            f"strategy {strategy!r} is unknown; expected one of {', '.join(_STRATEGIES)}."
            f"{did_you_mean(str(strategy), _STRATEGIES)}"
        )
    context = current()
    if len({parameter.device for parameter in model.parameters()}) <= 1:  # else its user has placed the parts
        model = _moved(model, context.backend.device())
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return model
    if strategy == "none":
        if sync_bn or kwargs:
            raise ConfigError("strategy='none' wraps nothing: it takes neither sync_bn nor other arguments")
        return model
    if strategy == "fsdp":
        if sync_bn and context.world_size > 1:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return context.backend.shard_model(model, **kwargs)
    wrapped = context.backend.wrap_model(model, sync_bn=sync_bn, **kwargs)
    if wrapped is model and context.world_size > 1 and not context.backend.model_stays:
        raise ConfigError(
            f"backend {context.backend.name!r} does not synchronise the gradients of a model, and there are "
            f"{context.world_size} ranks: each would train a model of its own. Use a backend that does."
        )
    return wrapped


def _moved(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model there, with weights still tied that were tied.

    On some devices tensors cannot take the place of those on the CPU: torch then makes a new parameter for each name.
    """
    first: dict[torch.nn.Parameter, str] = {}
    tied: list[tuple[str, str]] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            tied.append((name, first[parameter]))
    model = model.to(device)
    for name, same in tied:
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, model.get_parameter(same))
    return model
