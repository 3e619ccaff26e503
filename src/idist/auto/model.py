"""``auto_model``: the model, ready to train on all ranks alike."""

from __future__ import annotations

from typing import Any

import torch

from idist.errors import ConfigError
from idist.runtime import current

__all__ = ["auto_model"]


def auto_model(model: torch.nn.Module, sync_bn: bool = False, **kwargs: Any) -> torch.nn.Module:
    """Move a model to the device and let the backend wrap it, so that the ranks train one model.

    Parameters and buffers move. A model without trainable parameters has nothing to synchronise
    and comes back as it is. Models from ``torch.compile`` or apex, native AMP and GradScaler work
    as they do with the wrapper that the backend uses.

    Args:
        model: on any device.
        sync_bn: with several ranks, batch norm layers use the statistics of all ranks.
        **kwargs: for the wrapper, for example ``find_unused_parameters`` for DistributedDataParallel.

    Returns:
        The wrapped model; without other ranks and other devices, ``model`` itself.

    Raises:
        TypeError: not a model, or a keyword that the wrapper does not take.
        ConfigError: the backend returned a trainable model without gradient synchronisation.

    Cost: that of the wrapper: DistributedDataParallel compares the parameters' shapes and broadcasts
    parameters and buffers of rank 0.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.parallel.DistributedDataParallel.html
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"auto_model takes a torch.nn.Module, got {type(model).__name__}")
    context = current()
    if len({parameter.device for parameter in model.parameters()}) <= 1:  # else its user has placed the parts
        model = model.to(context.backend.device())
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return model
    wrapped = context.backend.wrap_model(model, sync_bn=sync_bn, **kwargs)
    if wrapped is model and context.world_size > 1 and not context.backend.optimizer_reduces:
        raise ConfigError(
            f"backend {context.backend.name!r} does not synchronise the gradients of a model, and there are "
            f"{context.world_size} ranks: each would train a model of its own. Use a backend that does."
        )
    return wrapped
