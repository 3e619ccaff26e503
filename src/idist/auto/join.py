"""Training on data of which some ranks have more batches than others."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.distributed.algorithms.join import Join, Joinable

from idist import runtime
from idist.errors import ConfigError

__all__ = ["join"]


def join(*parts: Any) -> AbstractContextManager[Any]:
    """A context for a training loop in which ranks run out of batches at different times, and none waits for ever.

    A rank whose loop has ended goes on answering the reductions of the others until theirs have ended too. Then all
    ranks have the weights of the rank that ended last. While some have ended, gradients are still divided by the
    whole world size.

        with idist.join(model):
            for images, labels in loader: ...

    Inside it no other collectives, of idist or torch: the rank that has ended does not answer those.

    Args:
        parts: the model that auto_model returned, and what else reduces in each step, such as a
            ZeroRedundancyOptimizer.

    Returns:
        torch's Join, or where one rank is all, a context that does nothing.

    Raises:
        ConfigError: there are several ranks, and a part does not know how to join.

    Cost: one all_reduce of a number in each step.

    Source: https://docs.pytorch.org/tutorials/advanced/generic_join.html
    """
    context = runtime.current()
    if context.world_size == 1:
        return nullcontext()
    strangers = [type(part).__name__ for part in parts if not isinstance(part, Joinable)]
    if strangers or not parts:
        raise ConfigError(
            "join takes what torch's Join does, a DistributedDataParallel (from auto_model) or a "
            f"ZeroRedundancyOptimizer, got {', '.join(strangers) or 'nothing'}; with a model of another kind give all "
            "ranks equally many batches: uneven='pad' or 'drop'"
        )
    return Join(list(parts))
