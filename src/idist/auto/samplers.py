"""Which rank draws which samples. The order is one for all ranks; each rank takes every world-size-th item of it."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from idist import collectives, runtime
from idist.errors import ConfigError, PeerFailed

__all__ = ["DistributedProxySampler", "ShardSampler"]


class _Sharing(DistributedSampler[Any]):
    """Shares one order of items out over the ranks; what the order is, a subclass says.

    Attributes:
        epoch: of the pass that comes next. It goes up by one at the end of every complete pass. A pass that
            is left early does not count, so that one rank may look at its first batch on its own. (A loader with
            workers reads ahead, small data to the end: then set the epoch.)
        num_samples: items of this rank in one pass.
        total_size: items of all ranks in one pass, with those that pad and without those that are dropped.
    """

    def __init__(
        self,
        source: Sized,
        num_replicas: int | None,
        rank: int | None,
        *,
        shuffle: bool,
        seed: int,
        drop_last: bool,
        pad: bool,
    ) -> None:
        context = runtime.current()
        num_replicas = context.world_size if num_replicas is None else num_replicas
        rank = context.rank if rank is None else rank
        _check_integers(num_replicas=num_replicas, rank=rank, seed=seed)
        if not 0 <= rank < num_replicas:
            raise ConfigError(f"rank must be between 0 and num_replicas - 1, got rank={rank} of {num_replicas}")
        super().__init__(
            source,  # type: ignore[arg-type]  # a Dataset to torch, which asks for its length only
            num_replicas=num_replicas,
            rank=rank,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
        )
        self.pad = pad and not drop_last
        self._source = source
        self._measure(len(source))

    @abstractmethod
    def _order(self) -> Sequence[Any] | Tensor:
        """The items of all ranks in this epoch, the same on every rank; a tensor stands for its integers."""

    def __iter__(self) -> Iterator[Any]:
        epoch = self.epoch
        mine = self._share(self._order())
        return self._one_pass(mine, epoch)

    def __len__(self) -> int:
        """The items of this rank in one pass."""
        self._measure(len(self._source))
        return self.num_samples

    def _one_pass(self, mine: Iterable[Any], epoch: int) -> Iterator[Any]:
        yield from mine
        if self.epoch == epoch:
            self.epoch = epoch + 1

    def _share(self, order: Sequence[Any] | Tensor) -> Iterable[Any]:
        """Places rank, rank + n, rank + 2n, ... of the order; where it pads, a place past the end wraps around."""
        self._measure(len(order))
        places = range(self.rank, self.total_size, self.num_replicas)
        if isinstance(order, Tensor):
            # Only this rank's share becomes Python integers.
            at = places.start + places.step * torch.arange(len(places), device=order.device)
            return order[at % max(1, len(order))].tolist()
        return (order[place % len(order)] for place in places)

    def _measure(self, length: int) -> None:
        n = self.num_replicas
        if self.pad:
            self.num_samples = -(-length // n)
        elif self.drop_last:
            self.num_samples = length // n
        else:
            self.num_samples = len(range(self.rank, length, n))
        self.total_size = length if not self.pad and not self.drop_last else self.num_samples * n


class ShardSampler(_Sharing):
    """The indices of a map-style dataset, sequential or shuffled, shared out over the ranks.

    The order is a function of ``(seed, epoch)`` alone, the same on every number of ranks, and is drawn with a
    generator of its own: no global random state is read or written, and nothing is communicated. With the
    default seed it is the order of torch's :class:`~torch.utils.data.DistributedSampler`. Unlike there, seeds 1
    and 2 have no order in common, the epoch advances by itself (see ``set_epoch``), and the ranks can take
    exactly the dataset.

    Args:
        dataset: what is indexed; only its length is used.
        num_replicas: number of ranks that share the indices; default: the world size.
        rank: this process's place among them; default: its rank.
        shuffle: whether the order is a random one.
        seed: of the random orders.
        drop_last: leave out up to ``num_replicas - 1`` indices at the end, so that all ranks have equally many.
        pad: repeat up to ``num_replicas - 1`` indices from the beginning, so that all ranks have equally many.
            ``False``: each index exactly once over the ranks, and some ranks have one less: for evaluation.
            ``drop_last=True`` goes before.

    Raises:
        ConfigError: ``rank`` is not one of ``num_replicas``, or one of the numbers is not an integer.

    Cost: no collective. One pass takes O(1) memory in sequence and 8 bytes per sample of the dataset shuffled.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        pad: bool = True,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=shuffle, seed=seed, drop_last=drop_last, pad=pad)

    def _order(self) -> Sequence[int] | Tensor:
        length = len(self._source)
        if not self.shuffle:
            return range(length)
        generator = torch.Generator()
        generator.manual_seed(mixed_seed(self.seed, self.epoch))
        return torch.randperm(length, generator=generator, device="cpu")  # whatever the default device


class DistributedProxySampler(_Sharing):
    """Any sampler, shared out over the ranks.

    In epoch e the ranks together draw, with the default seed, what the wrapped sampler draws after
    ``torch.manual_seed(e)``, and with another seed what it draws after a seed made of ``(seed, e)``. The global
    random state of torch is then put back as it was, also if the sampler raises. Random numbers from elsewhere
    (NumPy, ``random``, a generator of the sampler's own) are neither seeded nor put back.

    **Rank 0's order counts.** In the context's world only rank 0 iterates the wrapped sampler, and the others are
    told its order. Samplers that would disagree, having a generator seeded per rank or weights computed apart,
    therefore still give each item once over the ranks; and a state that they keep advances on rank 0 only. So
    beginning a pass is a collective: **all ranks begin it, or none**. A DataLoader begins it in its main process,
    with workers too.

    With a ``num_replicas`` or ``rank`` other than the context's there is no collective: each such sampler draws
    the order itself, and they agree as far as the wrapped samplers are functions of torch's seed.

    Args:
        sampler: a finite sampler, or any other iterable, with a length. If it yields more or fewer items than its
            length says, what it yields is shared out. Items can be anything, batches too.
        num_replicas: number of ranks that share the items; default: the world size.
        rank: this process's place among them; default: its rank.
        seed: of the draws; without effect on a sampler that has a generator of its own.
        drop_last: leave out up to ``num_replicas - 1`` items at the end, so that all ranks have equally many.
        pad: repeat up to ``num_replicas - 1`` items from the beginning, so that all ranks have equally many.
            ``False``: each item exactly once over the ranks, and some ranks have one less.
            ``drop_last=True`` goes before.

    Raises:
        TypeError: not an iterable with a length, or distributed already.
        ConfigError: ``rank`` is not one of ``num_replicas``, or one of the numbers is not an integer.
        PeerFailed: on beginning a pass, if the wrapped sampler raised on rank 0; there, the error itself.

    Cost: one object broadcast per pass, of 8 bytes per item if the items are integers, else of their pickle
        (trusted ranks only); none where one rank is all.
    """

    def __init__(
        self,
        sampler: Iterable[Any],
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        drop_last: bool = False,
        pad: bool = True,
    ) -> None:
        given: object = sampler
        if isinstance(given, DistributedSampler):
            raise TypeError(f"{type(given).__name__} is distributed already: use it as it is, without a proxy")
        if not isinstance(given, Iterable) or not isinstance(given, Sized):
            raise TypeError(f"a sampler is an iterable with a length (__iter__ and __len__), got {given!r}")
        super().__init__(given, num_replicas, rank, shuffle=False, seed=seed, drop_last=drop_last, pad=pad)
        self.sampler: Iterable[Any] = sampler

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass; a wrapped sampler that has a ``set_epoch`` is told too."""
        super().set_epoch(epoch)
        inner = getattr(self.sampler, "set_epoch", None)
        if callable(inner):
            inner(epoch)

    def _order(self) -> Sequence[Any]:
        context = runtime.current()
        if self.num_replicas > 1 and (context.world_size, context.rank) == (self.num_replicas, self.rank):
            return self._order_of_rank_0()
        return self._draw()

    def _draw(self) -> list[Any]:
        with seeded(mixed_seed(self.seed, self.epoch)):
            return list(self.sampler)

    def _order_of_rank_0(self) -> Sequence[Any]:
        # Not a comparison of all ranks' orders with a broadcast where they differ: that saves bytes (8 MB of a
        # million) but draws world-size times, and its second collective would come only on some days.
        if self.rank != 0:
            order, failure = collectives.broadcast(None, src=0)
            if failure is not None:
                raise PeerFailed(f"the sampler raised on rank 0, whose order counts: {failure}")
            return order  # type: ignore[no-any-return]
        try:
            drawn = _compact(self._draw())
        except Exception as error:
            collectives.broadcast((None, f"{type(error).__name__}: {error}"), src=0)
            raise
        collectives.broadcast((drawn, None), src=0)
        return drawn


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's global generators seeded as by ``torch.manual_seed``, and afterwards as they were.

    CUDA's are left alone while CUDA is not in use: seeding them would be remembered until it is.
    """
    cuda = torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed_all(seed)
        yield


def mixed_seed(seed: int, epoch: int) -> int:
    """The seed of one epoch: the epoch itself for seed 0, as in torch, else a hash of both.

    ``seed + epoch`` would give seed 1 in epoch 1 what seed 2 has in epoch 0.
    """
    if seed == 0:
        return epoch
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:7], "big")


def _compact(items: list[Any]) -> Sequence[Any]:
    """Integers as an array, which travels as 8 bytes each; anything else as it is."""
    if set(map(type, items)) != {int}:
        return items
    try:
        return array("q", items)
    except OverflowError:
        return items


def _check_integers(**numbers: object) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise ConfigError(f"{name} must be an integer, got {number!r}")
