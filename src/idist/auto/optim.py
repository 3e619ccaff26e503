"""``auto_optim``: the optimizer, ready to step with the gradients of all ranks."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from idist.runtime import current

__all__ = ["auto_optim"]


def auto_optim(optimizer: Optimizer, **kwargs: Any) -> Optimizer:
    """Let the backend adapt an optimizer, where wrapping the model is not enough.

    Args:
        optimizer: of the parameters of the model that :func:`auto_model` returned.
        **kwargs: for the backend's wrapper.

    Returns:
        ``optimizer`` itself, unless the backend reduces gradients in the optimizer. ``state_dict``,
        ``load_state_dict``, ``step(closure)`` and schedulers work as on the bare one.

    Raises:
        TypeError: not an optimizer, or a keyword that nobody takes.

    Cost: none, unless the backend says otherwise.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"auto_optim takes a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return current().backend.wrap_optimizer(optimizer, **kwargs)
