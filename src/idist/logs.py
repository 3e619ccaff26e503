"""Lines that tell which rank they come from, and that do not come from all of them."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

from idist.runtime import current

__all__ = ["get_logger", "print_once"]

if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter


class _RankLogger(_Adapter):
    """Asks for the rank when something is logged: a logger may be made before the ranks have met."""

    def __init__(self, logger: logging.Logger, all_ranks: bool) -> None:
        super().__init__(logger, {})
        self._all_ranks = all_ranks

    def isEnabledFor(self, level: int) -> bool:
        speaks = self._all_ranks or level >= logging.ERROR or current().rank == 0
        return speaks and super().isEnabledFor(level)

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        context = current()
        return f"[rank {context.rank} of {context.world_size}] {msg}", kwargs


def get_logger(name: str, *, all_ranks: bool = False) -> logging.LoggerAdapter[logging.Logger]:
    """A logger whose lines begin with the rank, as in ``[rank 0 of 8] epoch 3``.

    Only rank 0 logs, except for errors: these come from the rank that has them. Levels, handlers and
    formats are those of :mod:`logging`, as for any logger of this name.

    Args:
        name: of the logger, usually ``__name__``.
        all_ranks: every rank logs everything.

    Cost: no collective.
    """
    return _RankLogger(logging.getLogger(name), all_ranks)


def print_once(*values: object, **options: Any) -> None:
    """``print`` on rank 0, at once; nothing on the others. Arguments as for ``print``. Cost: no collective."""
    if current().rank == 0:
        print(*values, **{"flush": True, **options})
