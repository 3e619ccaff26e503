"""Batches on the device, copied while the batch before is in use."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = ["OnDevice"]


class OnDevice:
    """A loader whose batches are on an accelerator; on CUDA the next one is copied meanwhile, on a stream of its own.

    The copy runs beside the computation only from pinned memory (``pin_memory=True``). In a batch, tensors in lists,
    tuples and dicts are copied ahead, other things that have a ``to`` when their batch is asked for; the rest stays
    as it is.
    """

    def __init__(self, batches: Iterable[Any], device: torch.device) -> None:
        self._batches = batches
        self._device = device

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]  # raises TypeError, as of any loader without a length

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._batches)
        return self._copied_ahead(batches) if self._device.type == "cuda" else self._copied(batches)

    def _copied(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            yield tree_map(self._moved, batch)

    def _copied_ahead(self, batches: Iterator[Any]) -> Iterator[Any]:
        side = torch.cuda.Stream(self._device)
        ahead: deque[tuple[Any, torch.cuda.Event]] = deque()
        for batch in batches:
            with torch.cuda.stream(side):
                # The event is of this copy alone: to wait for the stream would be to wait for the next batch too.
                ahead.append((tree_map(self._sent, batch), side.record_event()))
            if len(ahead) > 1:
                yield self._arrived(*ahead.popleft())
        while ahead:
            yield self._arrived(*ahead.popleft())

    def _moved(self, value: Any) -> Any:
        return value.to(self._device) if hasattr(value, "to") else value

    def _sent(self, value: Any) -> Any:
        return value.to(self._device, non_blocking=True) if isinstance(value, Tensor) else value

    def _arrived(self, batch: Any, copied: torch.cuda.Event) -> Any:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(copied)

        def use(value: Any) -> Any:
            if isinstance(value, Tensor):
                # Its memory is the side stream's, which must not have it back before this stream is done with it.
                value.record_stream(stream)
                return value
            return self._moved(value)

        return tree_map(use, batch)
