"""A checkpoint that is written while training goes on."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from idist import collectives
from idist.collectives import Handle
from idist.errors import ConfigError
from idist.runtime import Context, at_end
from idist.wire import Call

logger = logging.getLogger("idist")

_groups: WeakKeyDictionary[Context, Any] = WeakKeyDictionary()
_latest: WeakKeyDictionary[Context, Writing] = WeakKeyDictionary()


class Writing:
    """A write under way, in a thread that talks to those of the other ranks in a group of their own.

    Args:
        write: what to do, with that group; returns the checkpoint, on rank 0.
    """

    def __init__(self, context: Context, write: Callable[[Any], Path | None]) -> None:
        self._context = context
        self._done: Path | None = None
        self._error: BaseException | None = None
        self._told = False
        # Only the thread has ``write``, and with it the copies of all tensors.
        self._thread = threading.Thread(target=self._run, args=(write, _group(context)), name="idist checkpoint")
        self._thread.start()

    def _run(self, write: Callable[[Any], Path | None], group: Any) -> None:
        try:
            self._done = write(group)
        except BaseException as error:  # of the disk, or of another rank
            self._error = error

    def wait(self) -> None:
        """Wait for the own part, and hear of the others; all ranks call this."""
        self._thread.join()
        if self._told:
            return
        self._told = True
        with collectives.together(self._context, Call.SAVE):
            if self._error is not None:
                raise self._error

    def path(self) -> Path:
        """The checkpoint, when :meth:`wait` has returned. Cost: one broadcast of a path."""
        path: Path = collectives.broadcast(self._done)
        return path

    def end(self) -> None:
        """Wait alone: the context ends, and the others may have done so."""
        self._thread.join()
        if self._error is not None and not self._told:
            logger.error("the last checkpoint could not be written", exc_info=self._error)


def begin(context: Context, write: Callable[[Any], Path | None]) -> Handle:
    """Write in the background; the handle's ``wait()`` gives the path.

    Raises:
        ConfigError: this backend cannot.
    """
    if context not in _latest:
        at_end.append(partial(_end, context))
    writing = _latest[context] = Writing(context, write)
    return Handle(writing, writing.path)


def finish_latest(context: Context) -> None:
    """One at a time: the next begins when the latest is done, on all ranks."""
    if context in _latest:
        _latest[context].wait()


def _end(context: Context) -> None:
    if context in _latest:
        _latest[context].end()


def _group(context: Context) -> Any:
    """All ranks, for tensors in the memory of the CPU; nobody else talks in it."""
    if context.world_size == 1:
        return None
    if not dist.is_initialized():
        raise ConfigError(
            f"async_op=True needs a process group of torch.distributed, which backend {context.backend.name!r} does "
            "not have; leave it out, and save waits for the disk"
        )
    if context not in _groups:
        library = dist.get_default_backend_for_device("cpu")
        _groups[context] = context.backend.new_group(context.everyone.ranks, backend=library)
        context.extra_groups.append(_groups[context])
    return _groups[context]
