"""What a process gets from us: the function, its arguments, and the output streams to write to.

Pickle is used here, between a process and those that it starts itself.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import torch

from idist.errors import ConfigError

_SHARING = "torch.multiprocessing.reductions"
_STREAMS = (1, 2)


class Payload:
    """What comes from the user: as it is for a forked process, pickled for any other.

    Tensors travel by value, except those that the user has put into shared memory. By default
    torch would share them all: a model among the arguments would then be one model for all ranks,
    stepped by each of them, and one with 250 tensors would need more descriptors than a fork
    server can pass.

    Args:
        otherwise: what else one can do about parts that cannot be pickled.

    Attributes:
        pickled: what to send to the process that was started last, when it asks for it.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        options: Mapping[str, Any],
        *,
        otherwise: str = "",
    ) -> None:
        self.fn = fn
        self.args = tuple(args)
        self.kwargs = dict(kwargs)
        self.options = dict(options)
        self.pickled = b""
        self._otherwise = otherwise

    def open(self, pipe: Connection) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], dict[str, Any]]:
        """The function, its arguments, and the options of ``runtime.start``."""
        return self.fn, self.args, self.kwargs, self.options

    def __reduce__(self) -> tuple[Any, ...]:
        # Called while a process is being started: only then can queues, locks and pipes be pickled. The bytes follow
        # later, through a pipe: multiprocessing would wait here until the process has imported the main module.
        pickled = _dump((self.fn, self.args, self.kwargs, self.options), self._blame)
        if pickled != self.pickled:  # most often they are the same for all, and then one copy is enough
            self.pickled = pickled
        return Expected, ()

    def _blame(self) -> str:
        """Which part cannot be pickled."""
        if not _can_dump(self.fn):
            return (
                f"the function {getattr(self.fn, '__qualname__', self.fn)} cannot be sent to another process. "
                f"Define it at the top level of a module (no lambda, no function inside a function){self._otherwise}"
            )
        parts = [(f"argument {index}", value) for index, value in enumerate(self.args)]
        parts += [(f"argument {name!r}", value) for name, value in self.kwargs.items()]
        parts += [(f"option {name!r}", value) for name, value in self.options.items()]
        named = [f"{name}, a {type(value).__name__}," for name, value in parts if not _can_dump(value)]
        blamed = " and ".join(named) or "the arguments"
        return f"{blamed} cannot be sent to another process. Make it in the function{self._otherwise}"


def is_only_here(fn: Callable[..., Any]) -> bool:
    """Whether ``fn`` was typed where no other process can import it.

    That is a notebook, an interactive session, ``-c``, standard input or a ``__main__.py``.
    """
    fn = getattr(fn, "func", fn)  # of a functools.partial
    if getattr(fn, "__module__", None) != "__main__":
        return False
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return f".{spec.name}".endswith(".__main__")
    return not os.path.isfile(getattr(main, "__file__", ""))


class Expected:
    """A payload on its way: what it needs is imported when the worker can report a failure."""

    def open(self, pipe: Connection) -> Any:
        """See :meth:`Payload.open`. Waits until all of it has come."""
        with open(pipe.fileno(), "rb", closefd=False) as file:
            return pickle.load(file)  # noqa: S301 - made by the process that started this one


class Streams:
    """Our standard output and error, for a process that the fork server has started with its own.

    The server keeps those that were there when it was started; they may lead elsewhere by now.
    """

    def __init__(self, descriptors: Sequence[Any] = ()) -> None:
        self._descriptors = descriptors

    def __reduce__(self) -> tuple[Any, ...]:
        return Streams, (tuple(reduction.DupFd(number) if is_open(number) else None for number in _STREAMS),)

    def adopt(self) -> None:
        """Make them the standard streams of this process."""
        for number, descriptor in zip(_STREAMS, self._descriptors, strict=False):
            if descriptor is not None:
                theirs = descriptor.detach()
                os.dup2(theirs, number)
                os.close(theirs)


class _ByValue(reduction.ForkingPickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.dispatch_table = {kind: _by_value(kind, reduce) for kind, reduce in dict(self.dispatch_table).items()}


def _by_value(kind: type[Any], reduce: Callable[[Any], Any]) -> Callable[[Any], Any]:
    if reduce.__module__ != _SHARING or kind is torch.cuda.Event:
        return reduce

    def reduce_value(value: Any) -> Any:
        memory = getattr(value, "_untyped_storage", value)  # a TypedStorage warns of itself
        shared = memory.device.type == "cpu" and memory.is_shared()
        return reduce(value) if shared else value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)

    return reduce_value


def _dump(value: object, blame: Callable[[], str]) -> bytes:
    file = io.BytesIO()
    try:
        _ByValue(file).dump(value)
    except Exception as error:  # whatever a __reduce__ of the user raises
        raise ConfigError(f"{blame()}: {type(error).__name__}: {error}") from error
    return file.getvalue()


def _can_dump(value: object) -> bool:
    try:
        _ByValue(io.BytesIO()).dump(value)
    except Exception:  # the same as in _dump
        return False
    return True


def is_open(descriptor: int) -> bool:
    """Whether this process has a descriptor of this number."""
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
