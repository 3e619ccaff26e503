"""An iterable dataset, shared out over ranks and DataLoader workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from idist.auto.samplers import Progress, batches, deal, number_of_steps, share_of

__all__ = ["ShardedIterable", "SteppedIterable", "Stepwise"]


class ShardedIterable(Progress, IterableDataset[Any]):
    """One rank's share of an iterable dataset: every ``num_replicas``-th item, each item on one rank.

    Every process, DataLoader workers included, reads the whole stream and keeps its part, so **the stream has to be
    the same in every process**: one that shuffles must do so by a seed of its own. Within a rank the workers
    take turns by batches, so that the batches and their order are those of a loader without workers.

    The dataset does not see DataLoader's workers: ``get_worker_info()`` is None while it is iterated. A dataset
    that splits itself over the workers of one process is therefore right here too. One that splits itself over
    ranks is not: do not wrap it (``shard=False``).

    Attributes that are read here and do not exist come from the dataset; ``set_epoch`` is passed on to it, where it
    has one.

    Args:
        dataset: the whole stream.
        num_replicas: number of ranks.
        rank: this process's.
        batch_size: of this rank's loader, 1 without batches.
        drop_last: leave out the last items that would not reach all ranks.
        pad: a rank without an item in the last round repeats one of the first. ``drop_last=True`` goes before. With
            neither, some ranks have one item less.

    Cost: no collective. Memory for one batch, and to ``pad`` for the first ``num_replicas`` items. To begin in the
        middle of an epoch the items before it are read again.
    """

    def __init__(
        self,
        dataset: IterableDataset[Any],
        *,
        num_replicas: int,
        rank: int,
        batch_size: int = 1,
        drop_last: bool = False,
        pad: bool = False,
    ) -> None:
        self.dataset = dataset
        self.num_replicas = num_replicas
        self.rank = rank
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.pad = pad and not drop_last
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[Any]:
        for batch, _ in self.steps():
            yield from batch

    def steps(self) -> Iterator[tuple[list[Any], int]]:
        """The batches of this rank, in a DataLoader's worker those that are its turn, with the positions after them."""
        worker = get_worker_info()
        index, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        items = islice(_unsplit(self.dataset), self.start, None)
        rounds = deal(items, self.start, self.num_replicas, self.rank, pad=self.pad, drop=self.drop_last)
        return islice(
            batches(rounds, self.start, self.num_replicas, self.batch_size, drop_last=False), index, None, count
        )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass, and that of the dataset if it has any."""
        super().set_epoch(epoch)
        inner = getattr(self.dataset, "set_epoch", None)
        if callable(inner):
            inner(epoch)

    def identity(self) -> dict[str, Any]:
        """What makes the order besides the epoch."""
        return {"order": "ShardedIterable", "dataset": type(self.dataset).__name__}

    def __len__(self) -> int:
        """Items of this rank, if the dataset has a length."""
        return self._share_of(self.rank)

    def _share_of(self, rank: int) -> int:
        length = len(self.dataset)  # type: ignore[arg-type]  # raises TypeError, as torch's loader expects
        return share_of(rank, length, self.num_replicas, pad=self.pad, drop=self.drop_last)

    def __getattr__(self, name: str) -> Any:
        # Pickling and copying ask for such names, for this object and before it has a dataset.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)


class SteppedIterable(ShardedIterable):
    """As a loader of ours reads it: yields whole batches, each with the position after it.

    Args:
        drop_last_batch: leave out the last batch if it is incomplete.
        **share: as :class:`ShardedIterable`.
    """

    def __init__(self, dataset: IterableDataset[Any], *, drop_last_batch: bool, **share: Any) -> None:
        super().__init__(dataset, **share)
        self.drop_last_batch = drop_last_batch

    def __iter__(self) -> Iterator[Any]:
        for batch, after in self.steps():
            if len(batch) == self.batch_size or not self.drop_last_batch:
                yield batch, after

    def number_of_steps(self) -> int:
        """Batches of this rank, if the dataset has a length."""
        return number_of_steps(len(self), self._share_of(0), self.batch_size, drop_last=self.drop_last_batch)


class Stepwise:
    """Collates what a :class:`SteppedIterable` yields, in a worker: gives the batch and the position after it."""

    def __init__(self, collate: Callable[[Any], Any], *, batched: bool) -> None:
        self.collate = collate
        self.batched = batched

    def __call__(self, read: Any) -> tuple[Any, int]:
        """The batch, or the item where there are no batches, and the position."""
        if self.batched:
            ((items, after),) = read
            return self.collate(items), after
        (item,), after = read
        return self.collate(item), after


def _unsplit(dataset: Iterable[Any]) -> Iterator[Any]:
    """The stream that ``dataset`` has in a process without DataLoader workers."""
    with _worker_hidden():
        items = iter(dataset)
    while True:
        with _worker_hidden():
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


@contextmanager
def _worker_hidden() -> Iterator[None]:
    # torch has no public way to say it; the name is the same since torch 1.2.
    info = torch_worker._worker_info
    torch_worker._worker_info = None
    try:
        yield
    finally:
        torch_worker._worker_info = info
