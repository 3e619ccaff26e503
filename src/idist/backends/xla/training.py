"""Training on XLA: gradients averaged after each backward pass, batches read and copied ahead of their use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils._pytree import tree_map

_END = object()


class Averaging:
    """Calls ``average`` with the gradients of a model at the end of each backward pass that has made any.

    They are those of all its parameters: zeros where this rank has not used one, as the ranks run one program.
    """

    def __init__(self, model: torch.nn.Module, average: Callable[[list[Tensor]], None]) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._average = average
        self._paused = False
        self._passing = -1
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._after_gradient)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Gradients stay as they are, to be averaged with those of a later pass."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def _after_gradient(self, _: Tensor) -> None:
        # By the number of the pass, not by a flag: a pass that raises does not come to its end.
        passing = torch._C._current_graph_task_id()
        if not self._paused and passing != self._passing:
            self._passing = passing
            Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        with torch.no_grad():
            self._average([parameter.grad for parameter in trained if parameter.grad is not None])


class Feed:
    """A loader whose next item is read and copied to the device, by a thread, while the one before is in use.

    torch_xla's own, MpDeviceLoader, ends a pass without a word when the data raise.

    Args:
        run: runs what has been computed on the device so far, before each item: a pass without an optimizer would
            otherwise become one program.
    """

    def __init__(self, items: Iterable[Any], device: torch.device, run: Callable[[], None]) -> None:
        from torch_xla.core import xla_model

        self._items = items
        self._device = device
        self._run = run
        self._send = xla_model.send_cpu_data_to_device

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]  # raises TypeError, as of any loader without a length

    def __iter__(self) -> Iterator[Any]:
        return self._ahead(iter(self._items))

    def _ahead(self, items: Iterator[Any]) -> Iterator[Any]:
        with ThreadPoolExecutor(1, "idist feed") as thread:
            coming = thread.submit(self._next, items)
            while (item := coming.result()) is not _END:
                coming = thread.submit(self._next, items)
                self._run()
                yield item
            self._run()

    def _next(self, items: Iterator[Any]) -> Any:
        return tree_map(self._moved, next(items, _END))

    def _moved(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device == self._device:
            return value
        # Not by to(): what the other thread runs meanwhile would take in a tensor that is not filled yet.
        [moved] = self._send([value.detach().as_subclass(Tensor)], self._device)
        return moved
