"""Process sets. Horovod makes one only with the help of all ranks; a group of ours needs its members alone."""

from __future__ import annotations

import itertools
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from idist.errors import ConfigError, PeerFailed

NON_MEMBER = "not a member of this process set"
"""What stands for a process set on the ranks that are not in it."""

_FOREVER = timedelta(days=365)
_LINGER_S = 2.0


class ProcessSets:
    """The process sets of a session, by their ranks. Each is made once and lasts as long as Horovod does.

    On every rank a thread takes part in making those that any rank asks for, one after the other
    in the order in which the store has got the requests: Horovod numbers them, and the numbers
    must be the same everywhere. Where the user has started Horovod there is no store, and all ranks
    ask.

    Args:
        store: where the ranks have met.
        timeout: how long to wait for the other ranks.
    """

    def __init__(self, hvd: Any, timeout: timedelta, store: dist.Store | None = None, world_size: int = 1) -> None:
        self._hvd = hvd
        self._timeout = timeout
        self._store = None if store is None or world_size == 1 else store
        self._world_size = world_size
        self._made: dict[tuple[int, ...], Any] = {}
        self._news = threading.Condition()
        self._failure: Exception | None = None
        self._over = False
        if self._store is not None:
            # A wait of one thread blocks all others that use the same connection.
            waiting = self._store.clone()  # type: ignore[attr-defined] # not in torch's stubs
            self._thread = threading.Thread(target=self._serve, args=(waiting,), name="idist process sets", daemon=True)
            self._thread.start()

    def of(self, ranks: tuple[int, ...], *, member: bool) -> Any:
        """The process set of these ranks; :data:`NON_MEMBER` where this rank is not one of them.

        Raises:
            ConfigError: Horovod was started by the user without process sets that can be added.
            PeerFailed: another rank has ended Horovod, or did not ask in time.
        """
        if not member and self._store is not None:
            return NON_MEMBER
        if ranks not in self._made:
            self._ask(ranks)
            with self._news:
                self._news.wait_for(lambda: ranks in self._made or self._over, self._timeout.total_seconds())
            if ranks not in self._made:
                raise self._explained(ranks) from self._failure
        return self._made[ranks] if member else NON_MEMBER

    def end(self, *, linger: bool) -> None:
        """End the threads of all ranks: Horovod ends on all of them when it does on one.

        Args:
            linger: wait a moment for the others, who would otherwise lose the store that this rank serves.
        """
        if self._store is None:
            return
        with suppress(dist.DistError):  # whoever serves the store is gone, and so are the threads
            self._post("")
            until = time.monotonic() + _LINGER_S
            while linger and self._store.add("left", 0) < self._world_size and time.monotonic() < until:
                time.sleep(0.005)
        self._thread.join(_LINGER_S)  # one that waits in C++ when the interpreter ends aborts the process

    def _ask(self, ranks: tuple[int, ...]) -> None:
        if self._store is None:
            threading.Thread(target=self._make, args=(ranks,), daemon=True).start()
            return
        request = ",".join(map(str, ranks))
        with suppress(dist.DistError):
            if self._store.add(f"asked for {request}", 1) == 1:
                self._post(request)

    def _post(self, request: str) -> None:
        assert self._store is not None
        self._store.set(f"request {self._store.add('requests', 1)}", request)

    def _serve(self, store: dist.Store) -> None:
        with suppress(dist.DistError):
            for number in itertools.count(1):
                store.wait([f"request {number}"], _FOREVER)
                request = store.get(f"request {number}").decode()
                if not request or self._over:
                    break
                self._make(tuple(map(int, request.split(","))))
            store.add("left", 1)
        self._stop(None)

    def _make(self, ranks: tuple[int, ...]) -> None:
        try:
            known = {tuple(known): number for number, known in _numbers(self._hvd).items()}
            if ranks in known:  # given to hvd.init()
                made = self._hvd.ProcessSet(list(ranks))
                made.process_set_id = known[ranks]
            else:
                made = self._hvd.add_process_set(list(ranks))
        except Exception as error:  # whatever it is, the one who waits has to hear of it
            self._stop(error)
            return
        with self._news:
            self._made[ranks] = made
            self._news.notify_all()

    def _stop(self, failure: Exception | None) -> None:
        with self._news:
            self._over, self._failure = True, failure
            self._news.notify_all()

    def _explained(self, ranks: tuple[int, ...]) -> Exception:
        if self._failure is not None and "HOROVOD_DYNAMIC_PROCESS_SETS" in str(self._failure):
            return ConfigError(
                f"a group of the ranks {list(ranks)} needs process sets that can be added: call "
                'hvd.init(process_sets="dynamic"), or leave hvd.init() to idist.initialize("horovod")'
            )
        if self._over:
            return PeerFailed(
                f"a group of the ranks {list(ranks)} was asked for when Horovod had ended on another rank"
            )
        return PeerFailed(
            f"the other ranks did not help to make a group of the ranks {list(ranks)} within "
            f"{self._timeout.total_seconds():g} s. Where the script has called hvd.init(), all ranks have to call "
            "idist.new_group(), those too that are not in it."
        )


def _numbers(hvd: Any) -> dict[int, list[int]]:
    """The ranks of all process sets, by Horovod's number. It has no public name for that."""
    found: dict[int, list[int]] = hvd.mpi_ops._basics._get_process_set_ids_and_ranks()
    return found
