"""The data loader that auto_dataloader makes: a torch DataLoader that knows its position and can go on from there."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    default_convert,
)

from idist import collectives, preemption, runtime
from idist.auto.iterable import SteppedIterable, Stepwise
from idist.auto.samplers import DistributedProxySampler, Progress, Sharing, batches
from idist.errors import ConfigError

__all__ = ["AsItIs", "Loader"]

_KEYS = {"epoch", "position", "order", "generator", "drawn"}


class Loader(DataLoader[Any]):
    """This rank's loader, made by :func:`idist.auto_dataloader`: a torch DataLoader, with the following beside it.

    - ``set_epoch(epoch)``; left out, the epoch goes up by itself with each complete pass, that is when the last
      batch has been asked for, however far workers read ahead.
    - ``state_dict()`` and ``load_state_dict(state)``: go on in the middle of an epoch, on any number of ranks.
    - ``repr(loader)`` says what this rank gets.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        shared: Sharing | SteppedIterable | AsItIs,
        fed_by: Callable[[Iterable[Any]], Iterable[Any]],
        facts: Callable[[Loader], str],
        **options: Any,
    ) -> None:
        if isinstance(shared, SteppedIterable):
            options["collate_fn"] = _stepwise(options)
        super().__init__(dataset, **options)
        if isinstance(shared, AsItIs) and shared.source is None:
            shared.source = self.sampler
        self._shared = shared
        self._facts = facts
        self._latest: _Passing | None = None
        self._workers_began: tuple[int, int] | None = None
        # torch makes a BatchSampler of its own from the batch size, and has its attributes set by nobody afterwards.
        if isinstance(shared, SteppedIterable) and self.batch_sampler is not None:
            object.__setattr__(self, "batch_sampler", BatchSampler(self.sampler, 1, drop_last=False))
        elif isinstance(shared, Sharing):
            shared.advances = False  # the passes are counted here
            if shared is self.sampler and self.batch_sampler is not None:
                object.__setattr__(self, "batch_sampler", _Steps(shared, self.batch_size, self.drop_last))
        self._fed_by = fed_by

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch promises a class of its own
        passing = self._latest = _Passing(self._shared.epoch, self._shared.start, _generator_state(self._shared))
        # Made for one pass: held, it would hold this loader, whose workers then end late or not at all. They end in
        # order when the last reference goes.
        return self._one_pass(iter(self._fed_by(_Pairs(self))), passing)

    def __len__(self) -> int:
        """Batches of this rank in a whole pass.

        Raises:
            TypeError: an iterable dataset has no length.
        """
        return self._shared.number_of_steps() if isinstance(self._shared, SteppedIterable) else super().__len__()

    def __repr__(self) -> str:
        return f"<auto_dataloader: {self._facts(self)}>"

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass, which is then a whole one unless it is the epoch that was resumed."""
        self._latest = None
        self._shared.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the ranks are: after the batch that was given last, however far workers have read ahead.

        Returns:
            A small dict of numbers, strings and at most one tensor, equal on all ranks that have had equally many
            batches, except of data that differ by rank (``shard=False``). Where batches are uneven, a rank that
            has none left is at the beginning of the next epoch; rank 0 never ends before another.

        Raises:
            ConfigError: the order cannot be taken up again; says why.

        Cost: no collective.
        """
        if self.num_workers and not self.in_order:
            raise ConfigError("with in_order=False the position of a loader is unknown; leave it out to save a state")
        _check_repeatable(self._shared)
        latest = self._latest
        if latest is None or latest.epoch != self._shared.epoch:
            latest = _Passing(self._shared.epoch, self._shared.start, _generator_state(self._shared))
        drawn = getattr(self._shared, "drawn", None) if latest.position else None
        return {**dataclasses.asdict(latest), "order": self._shared.identity(), "drawn": drawn}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Let the next pass be the rest of the epoch that ``state`` comes from: the samples not had then, each once.

        The number of ranks, the batch size and the number of workers may be others than they were. Every rank calls
        this. Rank 0's state counts, as it is never behind another rank's, and the others may pass None; only where
        the data differ by rank (``shard=False``) each rank passes its own. An epoch all of whose batches had been
        given goes on with an empty pass, as the loop over them would have ended.

        Raises:
            ConfigError: not a state, or one of another order (dataset, seed, sampler); says what differs.

        Cost: one broadcast of an object; none with ``shard=False``. An iterable dataset is then read again from the
        beginning of the epoch, and so is everything with ``shard=False``; a sampler of yours draws again what it drew.
        """
        if not isinstance(self._shared, AsItIs):
            state = collectives.broadcast(state, src=0)
        if not isinstance(state, dict) or set(state) != _KEYS:
            raise ConfigError(f"load_state_dict takes what state_dict of such a loader returned, got {_short(state)}")
        ours, theirs = self._shared.identity(), state["order"]
        differing = [
            f"{key} {theirs.get(key)!r} in the state, {ours.get(key)!r} here"
            for key in sorted({*ours, *theirs})
            if ours.get(key) != theirs.get(key)
        ]
        if differing:
            raise ConfigError(f"the state is of another order than this loader's: {'; '.join(differing)}")
        generator = _generator(self._shared)
        if generator is not None and state["generator"] is not None:
            generator.set_state(state["generator"])
        self._latest = None
        self._shared.resume(state["epoch"], state["position"])
        if isinstance(self._shared, DistributedProxySampler):
            self._shared.drawn = self._shared.expected = state["drawn"]

    def pairs(self) -> Iterator[tuple[Any, int]]:
        """Begin a pass of torch's loader: each batch with the position after it, for what feeds the device."""
        shared = self._shared
        if isinstance(shared, SteppedIterable):
            self._renew_workers((shared.epoch, shared.start))
            return iter(self._begun(shared.start))
        host = self._begun(shared.start)
        if isinstance(shared, AsItIs):
            return _numbered(host, shared.start)
        if isinstance(self.batch_sampler, _Steps):
            return zip(host, _popped(self.batch_sampler.positions), strict=False)
        return zip(host, count(shared.start + shared.num_replicas, shared.num_replicas), strict=False)

    def _begun(self, start: int) -> Iterator[Any]:
        """A pass of torch's loader, which draws a seed for its workers from the program's random numbers.

        The first part of a pass that is resumed has drawn it already, so the rest draws from a generator of its own.
        (To set torch's own generator back would do, but for two threads at once: that hangs in torch 2.13.) So does a
        rank that is a thread: else it may draw in the midst of rank 0's drawing of the order.
        """
        context = runtime.current()
        if self.generator is not None or (start == 0 and not context.backend.rank_is_thread):
            return self._with_workers()
        place = f"{torch.initial_seed()} {self._shared.epoch} {start} {context.rank}"
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "big")
        self.generator = torch.Generator().manual_seed(seed)
        try:
            return self._with_workers()
        finally:
            self.generator = None

    def _with_workers(self) -> Iterator[Any]:
        if not self.num_workers:
            return super().__iter__()
        begin = self.worker_init_fn
        # In this process, which may be a copy of the one that has made the loader.
        self.worker_init_fn = partial(_begin_worker, begin, preemption.end_is_near())
        method = (self.multiprocessing_context or multiprocessing).get_start_method()
        try:
            with preemption.held_back(method):
                return super().__iter__()
        finally:
            self.worker_init_fn = begin

    def _one_pass(self, fed: Iterator[Any], passing: _Passing) -> Iterator[Any]:
        for batch, after in fed:
            passing.position = after
            yield batch
        self._shared.complete(passing.epoch)
        if self._latest is passing:
            self._latest = None

    def _renew_workers(self, begin: tuple[int, int]) -> None:
        """Persistent workers have a copy of the dataset, which begins where it did when they were started."""
        if self._iterator is not None and self._workers_began != begin:
            self._iterator = None
        self._workers_began = begin


@dataclasses.dataclass
class _Passing:
    """One pass: its epoch, how many items all ranks have had, the state that a sampler's generator began with."""

    epoch: int
    position: int
    generator: Tensor | None


class _Pairs:
    """What feeds the device iterates: pairs of a batch and a position."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        return self._loader.pairs()

    def __len__(self) -> int:
        return len(self._loader)


class _Steps(BatchSampler):
    """The batches of one rank, equally many on all if at all possible.

    Attributes:
        positions: after each batch of the pass that began last, and that has not been taken out yet.
    """

    def __init__(self, sampler: Sharing, batch_size: int | None, drop_last: bool) -> None:
        assert batch_size is not None
        super().__init__(sampler, batch_size, drop_last)
        self.positions: deque[int] = deque()

    def __iter__(self) -> Iterator[list[Any]]:
        self.positions = deque()
        return self._one_pass(self.positions)

    def __len__(self) -> int:
        return self._sharing.number_of_steps(self.batch_size, drop_last=self.drop_last)

    @property
    def _sharing(self) -> Sharing:
        assert isinstance(self.sampler, Sharing)
        return self.sampler

    def _one_pass(self, positions: deque[int]) -> Iterator[list[Any]]:
        shared = self._sharing
        steps = batches(shared.rounds(), shared.start, shared.num_replicas, self.batch_size, drop_last=self.drop_last)
        for batch, after in steps:
            positions.append(after)
            yield batch


class AsItIs(Progress):
    """Data that differ by rank already, or are meant to be the same: a position is a number of this rank's batches."""

    def __init__(self, source: Any, rank: int, world_size: int, batch_size: int | None) -> None:
        self.source = source
        self.start = 0
        self._own_epoch = 0
        self._place = {"rank": rank, "world_size": world_size, "batch_size": batch_size}

    @property
    def epoch(self) -> int:  # type: ignore[override]
        """That of the sampler, if it has any."""
        theirs = getattr(_innermost(self.source), "epoch", None)
        return theirs if isinstance(theirs, int) else self._own_epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, and that of the sampler or dataset if it has any."""
        if epoch != self.epoch:
            self.start = 0
        self._own_epoch = epoch
        inner = getattr(_innermost(self.source), "set_epoch", None)
        if callable(inner):
            inner(epoch)

    def complete(self, epoch: int) -> None:
        """Count the pass. A sampler of the user's own has its epoch set by the user."""
        self.start = 0
        self._own_epoch = epoch + 1

    def identity(self) -> dict[str, Any]:
        """What has to be the same."""
        return {"order": type(self.source).__name__, **self._place}


def _stepwise(options: dict[str, Any]) -> Stepwise:
    batched = options.get("batch_size", 1) is not None
    return Stepwise(options.get("collate_fn") or (default_collate if batched else default_convert), batched=batched)


def _begin_worker(begin: Callable[[int], object] | None, end_is_near: Connection, number: int) -> None:
    preemption.let_one_pass(end_is_near)
    if begin is not None:
        begin(number)


def _numbered(host: Iterator[Any], had: int) -> Iterator[tuple[Any, int]]:
    """Batches by number, without the first ``had``."""
    for number, batch in enumerate(host, 1):
        if number > had:
            yield batch, number


def _popped(positions: deque[int]) -> Iterator[int]:
    while True:
        yield positions.popleft()


def _innermost(source: Any) -> Any:
    """The sampler in a batch sampler or in one of ours."""
    inner = getattr(source, "sampler", None)
    return source if inner is None else _innermost(inner)


def _generator(shared: Any) -> torch.Generator | None:
    source = shared.source if isinstance(shared, AsItIs) else shared
    generator = getattr(_innermost(source), "generator", None) if not isinstance(source, SteppedIterable) else None
    return generator if isinstance(generator, torch.Generator) else None


def _generator_state(shared: Any) -> Tensor | None:
    generator = _generator(shared)
    return None if generator is None else generator.get_state()


def _check_repeatable(shared: Any) -> None:
    """Our own orders come from a seed; one that is drawn from the program's random numbers comes once."""
    drawing = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
    if isinstance(shared, AsItIs) and isinstance(_innermost(shared.source), drawing) and _generator(shared) is None:
        raise ConfigError(
            f"with shard=False a {type(_innermost(shared.source)).__name__} draws from the program's random numbers, "
            "and nobody can draw them again: give it a generator of its own to save a state"
        )


def _short(value: object) -> str:
    return f"a dict with the keys {sorted(map(str, value))}" if isinstance(value, dict) else repr(value)[:200]
