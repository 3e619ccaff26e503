"""The errors idist raises. A message says what was got, what was expected and what to do."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable

__all__ = [
    "BackendUnavailable",
    "CollectiveMismatch",
    "ConfigError",
    "IdistError",
    "LaunchError",
    "PeerFailed",
    "UnknownArgument",
    "WorkerFailed",
]


class IdistError(Exception):
    """Base of every error of idist."""


class ConfigError(IdistError, ValueError):
    """An argument, or a combination of arguments, cannot be used."""


class UnknownArgument(ConfigError, TypeError):
    """A keyword argument that nobody takes; Python's own TypeError for those that we pass on."""


class LaunchError(IdistError, RuntimeError):
    """The launcher's variables are missing or contradict each other, or the ranks could not meet."""


class BackendUnavailable(IdistError, ValueError):
    """A known backend cannot be used here and now.

    Args:
        name: the backend asked for.
        reason: why it is unusable on this machine.
        fix: what to do about it, an exact command where there is one.
    """

    def __init__(self, name: str, reason: str, fix: str) -> None:
        super().__init__(name, reason, fix)
        self.name = name
        self.reason = reason
        self.fix = fix

    def __str__(self) -> str:
        return f"backend {self.name!r} cannot be used here: {self.reason}. {self.fix}"


class PeerFailed(IdistError, RuntimeError):
    """Another rank raised where this one depends on its success."""


class CollectiveMismatch(IdistError, RuntimeError):
    """The ranks called the same collective with things that do not fit together."""


class WorkerFailed(IdistError, RuntimeError):
    """A process started by :class:`idist.Parallel` failed; the others were ended.

    Attributes:
        rank: the rank that failed first.
        exitcode: its exit code, negative for a signal as in :mod:`subprocess`; ``None`` if it
            raised and was ended by us.
        details: its traceback, or how it ended when it left none.
    """

    def __init__(self, rank: int, exitcode: int | None, details: str) -> None:
        super().__init__(rank, exitcode, details)
        self.rank = rank
        self.exitcode = exitcode
        self.details = details

    def __str__(self) -> str:
        return f"rank {self.rank} failed first; the other ranks were ended.\n\n{self.details}"


def describe_exit(exitcode: int) -> str:
    """How a process ended, in words: ``exit code 3`` or ``killed by signal 9 (SIGKILL)``."""
    if exitcode >= 0:
        return f"exit code {exitcode}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = "unknown signal"
    return f"killed by signal {-exitcode} ({name})"


def close_match(name: str, known: Iterable[str]) -> str | None:
    """The known name that was most likely meant."""
    by_small_letters = {each.lower(): each for each in known}
    closest = difflib.get_close_matches(name.lower(), list(by_small_letters), n=1)
    return by_small_letters[closest[0]] if closest else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'gloo'?`` with its leading blank, or nothing where no known name is close."""
    closest = close_match(name, known)
    return f" Did you mean {closest!r}?" if closest else ""
