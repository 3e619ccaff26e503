"""How a rank ends of an error: one that only suffers from another rank's failure lets that one speak first."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import traceback
from types import TracebackType

import torch.distributed as dist

from idist.errors import LaunchError, PeerFailed

PATIENCE_S = 5.0
"""How long the first failure may take to be shown, and its launcher to end the others."""

_CONSEQUENCE = re.compile(r"connection (closed|reset|refused)|broken pipe|timed? ?out", re.IGNORECASE)
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_installed = False


def may_be_consequence(error: BaseException) -> bool:
    """Whether it looks like what happens to a rank when another one is gone."""
    if isinstance(error, (PeerFailed, LaunchError, ConnectionError, TimeoutError, dist.DistError)):
        return True
    return isinstance(error, RuntimeError) and _CONSEQUENCE.search(str(error)) is not None


def show_causes_first() -> None:
    """From now on an error that nobody catches, and that may be a consequence of another rank's, is shown later.

    The rank whose failure is the cause is the first to show its error then, and the first to end: launchers blame
    whoever ends first, and end the others, most often before they have shown anything.
    """
    global _installed
    if not _installed:
        _installed = True
        sys.excepthook = _Hook()


class _Hook:
    """In the place of what was there, which still shows the error."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._show = sys.excepthook

    def __call__(self, kind: type[BaseException], error: BaseException, frames: TracebackType | None, /) -> None:
        if os.getpid() == self._process:
            if may_be_consequence(error):
                time.sleep(PATIENCE_S)
            _tell_torchrun(kind, error, frames)
        self._show(kind, error, frames)


def _tell_torchrun(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    """It ends with a summary, and shows the traceback there of a rank that has left it in a file.

    Source: https://docs.pytorch.org/docs/stable/elastic/errors.html
    """
    file = os.environ.get(_ERROR_FILE)
    if file is None:
        return
    shown = "".join(traceback.format_exception(kind, error, frames))
    more = {"py_callstack": shown, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError), open(file, "w") as out:  # the error is shown all the same
        json.dump({"message": {"message": f"{kind.__name__}: {error}", "extraInfo": more}}, out)
