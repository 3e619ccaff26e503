"""Where a thread is: in which operation, called from which line of the user's; read off its stack.

Nothing is noted while a collective runs, so that it costs nothing: whoever asks looks at the frames of the thread.
"""

from __future__ import annotations

import dataclasses
import linecache
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

_IDIST = str(Path(__file__).parents[1]) + os.sep
_COLLECTIVES = _IDIST + "collectives.py"
_BACKENDS = _IDIST + "backends" + os.sep
_LAUNCHERS = _IDIST + "launchers" + os.sep
_TESTING = _IDIST + "testing.py"
_TORCH = str(Path(torch.__file__).parent) + os.sep
_TORCH_DISTRIBUTED = os.path.join(_TORCH, "distributed", "")
_TORCH_PARALLEL = os.path.join(_TORCH, "nn", "parallel", "")
_LOGGED = os.path.join(_TORCH_DISTRIBUTED, "c10d_logger.py")
_PYTHON = str(Path(os.__file__).parent) + os.sep
_INSTALLED = ("site-packages", "dist-packages")
_ENGINE = "_engine_run_backward"
_VALUES = ("value", "tensor", "values", "total")
_CALLERS = 3
_INNERMOST = 6


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a thread is.

    Attributes:
        operation: what it is in that waits for other ranks, or may.
        certain: whether it does wait there, whatever the backend knows of operations under way.
        ranks: those that the operation is for; ``None``: all, or it is not known.
        where: the user's file, line and function.
        stack: the innermost frames, and those around the user's line; outermost first.
    """

    operation: str | None
    certain: bool
    ranks: tuple[int, ...] | None
    where: str
    stack: tuple[str, ...]


def footprint(thread: int) -> object:
    """What differs from what it was before where the thread with this identifier has gone on.

    With few exceptions: a loop that is at the same line again may look the same. What goes on below the user's call
    does not count, since a wait may be a loop.
    """
    frames = _frames(thread)
    outer = frames[max(_users(frames) - 1, 0) :]
    return [(id(frame.f_code), frame.f_lasti) for frame in outer], [id(frame) for frame in outer[:2]]


def place_of(thread: int) -> Place:
    """Where the thread with this identifier is."""
    frames = _frames(thread)
    users = _users(frames)
    where = _line(frames[users]) if users < len(frames) else "a place that is not in any file of the user's"
    inner, callers = frames[:users], frames[users : users + _CALLERS]
    told = [frame for frame in inner if not frame.f_code.co_filename.startswith("<frozen")][:_INNERMOST]
    return Place(*_operation(inner), where, tuple(_text(frame) for frame in reversed([*told, *callers])))


def _frames(thread: int) -> list[FrameType]:
    """From the innermost to the outermost, without those that have only started the user's function."""
    frames: list[FrameType] = []
    frame = sys._current_frames().get(thread)
    while frame is not None and not _starts_a_rank(frame.f_code):
        frames.append(frame)
        frame = frame.f_back
    return frames


def _starts_a_rank(code: CodeType) -> bool:
    return code.co_filename.startswith(_LAUNCHERS) or (code.co_filename == _TESTING and code.co_name == "work")


def _users(frames: Sequence[FrameType]) -> int:
    """Which frame is the innermost of the user's: of his own files, or else of a package that he has installed."""
    files = [frame.f_code.co_filename for frame in frames]
    others = [i for i, file in enumerate(files) if not _is_library(file)]
    own = [i for i in others if not any(part in files[i] for part in _INSTALLED)]
    return next(iter(own or others), len(frames))


def _is_library(file: str) -> bool:
    return file.startswith((_IDIST, _TORCH, "<frozen")) or _is_pythons(file)


def _is_pythons(file: str) -> bool:
    return file.startswith(_PYTHON) and not any(part in file for part in _INSTALLED)


def _operation(inner: Sequence[FrameType]) -> tuple[str | None, bool, tuple[int, ...] | None]:
    """What the user has called, if it is something in which ranks wait for each other."""
    if any(frame.f_code.co_name == "<module>" for frame in inner):  # an import, the first time that it is called
        return None, False, None
    ours = [frame for frame in inner if frame.f_code.co_filename.startswith(_IDIST)]
    collective = [frame for frame in ours if frame.f_code.co_filename == _COLLECTIVES]
    if collective:
        name = _name(ours[-1].f_code)
        values = ours[-1].f_locals if ours[-1] is collective[-1] else {}
        members = collective[-1].f_locals.get("members")
        return name + _described(values), True, getattr(members, "ranks", None)
    doing = next((frame.f_code.co_filename for frame in inner if not _is_pythons(frame.f_code.co_filename)), "")
    ours_waits = doing.startswith((_BACKENDS, _TESTING))  # and does not do something else there, such as an import
    if any(frame.f_code.co_name == _ENGINE for frame in inner):
        return "backward", ours_waits, None
    theirs = [frame for frame in inner if frame.f_code.co_filename.startswith((_TORCH_DISTRIBUTED, _TORCH_PARALLEL))]
    named = [frame for frame in theirs if frame.f_code.co_filename != _LOGGED]
    if ours and inner.index(ours[-1]) > max([inner.index(frame) for frame in named], default=-1):
        return (_name(ours[-1].f_code), True, None) if ours_waits or doing in _files(named) else (None, False, None)
    return (f"torch's {_name(named[-1].f_code)}", ours_waits, None) if named else (None, False, None)


def _files(frames: Sequence[FrameType]) -> set[str]:
    return {frame.f_code.co_filename for frame in frames}


def _name(code: CodeType) -> str:
    """``all_reduce``, ``Handle.wait``; of a function that was made in another, the outer one."""
    return str(getattr(code, "co_qualname", code.co_name)).partition(".<locals>")[0]


def _described(values: Mapping[str, Any]) -> str:
    """`` of float32 2x3 with SUM``, as far as the arguments tell."""
    value = next((values[name] for name in _VALUES if name in values), None)
    if isinstance(value, Tensor):
        what = f" of {shaped(str(value.dtype).removeprefix('torch.'), value.shape)}"
    else:
        what = "" if value is None else f" of {type(value).__name__}"
    op = values.get("op")
    return what + (f" with {op}" if isinstance(op, str) and op else "")


def shaped(dtype: str, shape: Sequence[int]) -> str:
    """``float32 2x3``."""
    return f"{dtype} {'x'.join(map(str, shape)) or 'scalar'}"


def _line(frame: FrameType) -> str:
    file = frame.f_code.co_filename
    for part in _INSTALLED:
        file = file.rpartition(f"{os.sep}{part}{os.sep}")[2]
    return f"{file.removeprefix(os.getcwd() + os.sep).removeprefix(_PYTHON)}:{frame.f_lineno} in {frame.f_code.co_name}"


def _text(frame: FrameType) -> str:
    source = linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0).strip()
    return _line(frame) + (f": {source}" if source else "")
