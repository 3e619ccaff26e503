"""Which rank draws which samples. The order is one for all ranks; each rank takes every world-size-th item of it."""

from __future__ import annotations

import hashlib
import sys
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from idist import collectives, runtime
from idist.auto.permutation import Permutation
from idist.errors import ConfigError, PeerFailed
from idist.topology import Topology

__all__ = [
    "NOTHING",
    "DistributedProxySampler",
    "Progress",
    "Round",
    "ShardSampler",
    "Sharing",
    "batches",
    "deal",
    "number_of_steps",
    "share_of",
]

Round = tuple[Any, int]
"""This rank's item, and how many of the order's items all ranks have had after the round."""

NOTHING: Any = object()
"""In place of the item, where the last round does not reach this rank."""

_FIRST_CHUNK, _CHUNK = 256, 8192
"""Items that are computed or drawn at a time."""

_TOLD_CHUNK = 1 << 20
"""Items that rank 0 tells the others at a time."""

_HEAD = 64
"""Items at the beginning of an order that it is recognised by."""


class _Chunk(NamedTuple):
    """Some items of an order: a hash of how the order began, if it can be had, and whether no more follow."""

    items: Sequence[Any]
    drawn: str | None
    last: bool


class Progress:
    """How far all ranks together have come in an order that has epochs.

    Attributes:
        epoch: of the pass that comes next.
        start: items of that epoch which all ranks together have had already, see :meth:`resume`; 0 for a whole pass.
    """

    epoch: int
    start: int

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass, which is a whole one if that is another epoch than it was."""
        if epoch != self.epoch:
            self.start = 0
        self.epoch = epoch

    def resume(self, epoch: int, start: int) -> None:
        """Let the next pass be the rest of ``epoch``, after the first ``start`` items of all ranks together.

        On any number of ranks: after each step, what the ranks have had is a beginning of the one order.
        """
        self.set_epoch(epoch)
        self.start = start

    def complete(self, epoch: int) -> None:
        """Go on to the next epoch after a pass of ``epoch``, unless an epoch has been set meanwhile."""
        if self.epoch == epoch:
            self.set_epoch(epoch + 1)


class Sharing(Progress, DistributedSampler[Any]):
    """Shares one order of items out over the ranks; what the order is, a subclass says.

    Attributes:
        epoch: of the pass that comes next. It goes up by one at the end of every complete pass. A pass that
            is left early does not count, so that one rank may look at its first batch on its own. (A loader of
            torch with workers reads ahead, small data to the end: then set the epoch. auto_dataloader's does not
            need that.)
        start: items of that epoch which all ranks together have had already; 0 for a whole pass.
        num_samples: items of this rank in a whole pass.
        total_size: items of all ranks in a whole pass, with those that pad and without those that are dropped.
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
        self.start = 0
        self.advances = True
        self._source = source
        self._measure(len(source))

    @abstractmethod
    def rounds(self) -> Iterator[Round]:
        """The rounds of the next pass, in each of which every rank takes one item, from ``start`` on."""

    def __iter__(self) -> Iterator[Any]:
        return self._one_pass(self.rounds(), self.epoch)

    def __len__(self) -> int:
        """The items of this rank in a whole pass."""
        self._measure(len(self._source))
        return self.num_samples

    def identity(self) -> dict[str, Any]:
        """What makes the order besides the epoch; a position means something in the same order only."""
        return {"order": type(self).__name__, "seed": self.seed, "length": len(self._source)}

    def _one_pass(self, rounds: Iterator[Round], epoch: int) -> Iterator[Any]:
        for item, _ in rounds:
            if item is not NOTHING:
                yield item
        if self.advances:
            self.complete(epoch)

    def number_of_steps(self, batch_size: int, *, drop_last: bool) -> int:
        """Batches of this rank in a whole pass, as :func:`batches` cuts them."""
        n, length = self.num_replicas, len(self._source)
        mine, most = (share_of(rank, length, n, pad=self.pad, drop=self.drop_last) for rank in (self.rank, 0))
        return number_of_steps(mine, most, batch_size, drop_last=drop_last)

    def _measure(self, length: int) -> None:
        n = self.num_replicas
        self.num_samples = share_of(self.rank, length, n, pad=self.pad, drop=self.drop_last)
        self.total_size = self.num_samples * n if self.pad or self.drop_last else length


class ShardSampler(Sharing):
    """The indices of a map-style dataset, sequential or shuffled, shared out over the ranks.

    The order is a function of ``(seed, epoch)`` alone, the same on every number of ranks, machine and version of
    torch. It is computed index by index (by a keyed permutation, a Feistel network with cycle walking), so that the
    first of a billion comes at once; no random state is read or written, and nothing is communicated. Unlike torch's
    :class:`~torch.utils.data.DistributedSampler`, which this is one of, it gives each index exactly once unless
    told otherwise, the epoch advances by itself (see ``set_epoch``), and seeds 1 and 2 have no order in common.

    Args:
        dataset: what is indexed; only its length is used.
        num_replicas: number of ranks that share the indices; default: the world size.
        rank: this process's place among them; default: its rank.
        shuffle: whether the order is a random one.
        seed: of the random orders.
        drop_last: leave out up to ``num_replicas - 1`` indices at the end, so that all ranks have equally many.
        pad: repeat up to ``num_replicas - 1`` indices from the beginning, so that all ranks have equally many.
            ``drop_last=True`` goes before. With neither, each index comes exactly once, and some ranks have one less.

    Raises:
        ConfigError: ``rank`` is not one of ``num_replicas``, or one of the numbers is not an integer.

    Cost: no collective. O(1) time and memory to begin a pass, whatever the length.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        pad: bool = False,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=shuffle, seed=seed, drop_last=drop_last, pad=pad)

    def rounds(self) -> Iterator[Round]:
        """The rounds of the next pass."""
        n, length = self.num_replicas, len(self._source)
        order = Permutation(length, f"{self.seed} {self.epoch}") if self.shuffle else None
        full, rest = divmod(max(0, length - self.start), n)
        return self._deal(order, range(self.start, self.start + full * n, n), rest, length)

    def identity(self) -> dict[str, Any]:
        """What makes the order besides the epoch."""
        return {**super().identity(), "shuffle": self.shuffle}

    def _deal(self, order: Permutation | None, full: range, rest: int, length: int) -> Iterator[Round]:
        n, size, done = self.num_replicas, _FIRST_CHUNK, 0
        while done < len(full):
            begins = full[done : done + size]
            items = _at(order, range(begins.start + self.rank, begins.stop + self.rank, begins.step))
            yield from zip(items, range(begins.start + n, begins.stop + n, n), strict=True)
            done, size = done + size, _CHUNK
        last = full.stop
        if rest == 0 or self.drop_last:
            return
        if self.rank < rest:
            yield _at(order, range(last + self.rank, last + self.rank + 1))[0], last + (n if self.pad else rest)
        elif self.pad:
            wrapped = (last + self.rank) % length
            yield _at(order, range(wrapped, wrapped + 1))[0], last + n
        else:
            yield NOTHING, last + rest


class DistributedProxySampler(Sharing):
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

    It streams: rank 0 draws and tells 2**20 items at a time (8 MiB of integers), and holds no more. An order of more
    than that therefore takes further collectives while the pass goes on, and **all ranks go through it in step**, as
    they do in training. Where they would not, because nodes have unequal numbers of processes, whose workers then
    read unequally far ahead, rank 0 tells the whole order at the beginning.

    With a ``num_replicas`` or ``rank`` other than the context's there is no collective: each such sampler draws
    the order itself, and they agree as far as the wrapped samplers are functions of torch's seed.

    Args:
        sampler: a sampler, or any other iterable, with a length. If it yields more or fewer items than its
            length says, what it yields is shared out. Items can be anything, batches too.
        num_replicas: number of ranks that share the items; default: the world size.
        rank: this process's place among them; default: its rank.
        seed: of the draws; without effect on a sampler that has a generator of its own.
        drop_last: leave out up to ``num_replicas - 1`` items at the end, so that all ranks have equally many.
        pad: repeat up to ``num_replicas - 1`` items from the beginning, so that all ranks have equally many.
            ``drop_last=True`` goes before. With neither, each item comes exactly once, and some ranks have one less.

    Raises:
        TypeError: not an iterable with a length, or distributed already.
        ConfigError: ``rank`` is not one of ``num_replicas``, or one of the numbers is not an integer.
        PeerFailed: on beginning or continuing a pass, if the wrapped sampler raised on rank 0; there, the error itself.
        ConfigError: on beginning the rest of an epoch, if the wrapped sampler draws something else than it did then.

    Cost: one object broadcast per pass and 2**20 items, of 8 bytes per item if the items are integers, else of their
        pickle (trusted ranks only); none where one rank is all.
    """

    def __init__(
        self,
        sampler: Iterable[Any],
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        drop_last: bool = False,
        pad: bool = False,
    ) -> None:
        given: object = sampler
        if isinstance(given, DistributedSampler):
            raise TypeError(f"{type(given).__name__} is distributed already: use it as it is, without a proxy")
        if not isinstance(given, Iterable) or not isinstance(given, Sized):
            raise TypeError(f"a sampler is an iterable with a length (__iter__ and __len__), got {given!r}")
        super().__init__(given, num_replicas, rank, shuffle=False, seed=seed, drop_last=drop_last, pad=pad)
        self.sampler: Iterable[Any] = sampler
        self.drawn: str | None = None  # how the order of the latest pass began
        self.expected: str | None = None  # how it has to begin if only its rest is to be had

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass; a wrapped sampler that has a ``set_epoch`` is told too."""
        super().set_epoch(epoch)
        inner = getattr(self.sampler, "set_epoch", None)
        if callable(inner):
            inner(epoch)

    def identity(self) -> dict[str, Any]:
        """What makes the order besides the epoch."""
        return {**super().identity(), "sampler": type(self.sampler).__name__}

    def rounds(self) -> Iterator[Round]:
        """The rounds of the next pass. A collective, where rank 0's order counts."""
        chunks = self._chunks()
        first = next(chunks)  # now, so that beginning a pass is what is collective
        self.drawn = first.drawn
        if self.start and self.expected not in (None, self.drawn):
            raise ConfigError(
                f"{type(self.sampler).__name__} does not draw again what it drew in epoch {self.epoch} when the state "
                "was saved, so its rest is unknown: let it draw from torch's random numbers, which are seeded here, "
                "from a generator of its own, or from a seed and its set_epoch"
            )
        items = chain(first.items, chain.from_iterable(chunk.items for chunk in chunks))
        return deal(items, self.start, self.num_replicas, self.rank, pad=self.pad, drop=self.drop_last)

    def _chunks(self) -> Iterator[_Chunk]:
        """The items of all ranks, some at a time; at least one chunk, and perhaps an empty one."""
        context = runtime.current()
        if self.num_replicas == 1 or (context.world_size, context.rank) != (self.num_replicas, self.rank):
            return self._draw(_CHUNK)
        if self.rank != 0:
            return self._hear()
        return self._tell(self._draw(_TOLD_CHUNK if _evenly_placed(context.topology) else sys.maxsize))

    def _draw(self, size: int) -> Iterator[_Chunk]:
        random = _RandomState(mixed_seed(self.seed, self.epoch))
        with random.in_use():
            items = iter(self.sampler)
            head = list(islice(items, _HEAD))
            drawn = hashlib.sha256(repr(head).encode()).hexdigest() if _is_plain(head) else None
            items = islice(chain(head, items), self.start, None)
        last = False
        while not last:
            with random.in_use():
                chunk = list(islice(items, size))
            last = len(chunk) < size
            yield _Chunk(chunk, drawn, last)

    def _tell(self, chunks: Iterator[_Chunk]) -> Iterator[_Chunk]:
        # Not a comparison of all ranks' orders with a broadcast where they differ: that saves bytes (8 MB of a
        # million) but draws world-size times, and its second collective would come only on some days.
        last = False
        while not last:
            try:
                items, drawn, last = next(chunks)
            except Exception as error:
                collectives.broadcast((None, f"{type(error).__name__}: {error}"), src=0)
                raise
            told = (_compact(items), drawn, last)
            collectives.broadcast((told, None), src=0)
            yield _Chunk(*told)

    def _hear(self) -> Iterator[_Chunk]:
        last = False
        while not last:
            told, failure = collectives.broadcast(None, src=0)
            if failure is not None:
                raise PeerFailed(f"the sampler raised on rank 0, whose order counts: {failure}")
            chunk = _Chunk(*told)
            last = chunk.last
            yield chunk


def deal(items: Iterable[Any], start: int, num_replicas: int, rank: int, *, pad: bool, drop: bool) -> Iterator[Round]:
    """Share a stream out in rounds: the i-th item of each goes to rank i. ``start`` items went before."""
    stream = iter(items)
    at = start
    head: list[Any] = []
    while True:
        mine, size = NOTHING, 0
        for item in islice(stream, num_replicas):
            if size == rank:
                mine = item
            if pad and len(head) < num_replicas:
                head.append(item)
            size += 1
        if size < num_replicas:
            break
        at += num_replicas
        yield mine, at
    if size == 0 or drop:
        return
    if pad and mine is NOTHING:
        # As if the items went on from the beginning.
        total = at - start + size
        mine = head[(at - start + rank) % total]
    yield mine, at + (num_replicas if pad else size)


def batches(
    rounds: Iterable[Round], start: int, num_replicas: int, size: int, *, drop_last: bool
) -> Iterator[tuple[list[Any], int]]:
    """One rank's batches, each with the number of items that all ranks have had after that step.

    All ranks have equally many batches if at all possible. Where a last, incomplete round would begin a new step for
    some ranks only, every rank keeps an item of the step before for it: the ranks that get one in that round give a
    full batch as usual, and the others one item less, which is then their last batch. (Not possible with one item a
    batch, or where there are fewer items than ranks.) After every step, what all ranks have had is a beginning of the
    order, so a pass can be taken up again after any step, on any number of ranks.
    """
    full: list[Any] = []  # until it is known what comes after it
    batch: list[Any] = []
    at = start
    for item, after in rounds:
        if full and after - at < num_replicas and size > 1:
            if item is NOTHING:
                full, batch = full[:-1], full[-1:]
            yield full, after - num_replicas
        elif full:
            yield full, at
        full = []
        if item is not NOTHING:
            batch.append(item)
        at = after
        if len(batch) == size:
            full, batch = batch, []
    last = full or batch
    if last and (len(last) == size or not drop_last):
        yield last, at


def share_of(rank: int, length: int, num_replicas: int, *, pad: bool, drop: bool) -> int:
    """How many of ``length`` items a rank has."""
    if pad:
        return -(-length // num_replicas)
    return length // num_replicas if drop else len(range(rank, length, num_replicas))


def number_of_steps(mine: int, most: int, size: int, *, drop_last: bool) -> int:
    """How many batches :func:`batches` cuts from ``mine`` items, where rank 0 has ``most``."""
    return mine // size if drop_last else -(-(most if mine and size > 1 else mine) // size)


def _at(order: Permutation | None, places: range) -> Sequence[int]:
    """What stands at these places of the order; ``None`` is the order of the indices themselves."""
    if order is None:
        return places
    # Of the CPU, whatever the default device. As many as fit a cache: then torch needs no threads either.
    return order.at(torch.arange(places.start, places.stop, places.step, device="cpu")).tolist()


class _RandomState:
    """Torch's global generators for one use, in turns with the rest of the program.

    The first turn begins as after ``torch.manual_seed(seed)``, each further one where the last ended.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states: tuple[Tensor, list[Tensor]] | None = None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        with seeded(self._seed):
            if self._states is not None:
                torch.set_rng_state(self._states[0])
                if self._states[1]:
                    torch.cuda.set_rng_state_all(self._states[1])
            yield
            cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
            self._states = torch.get_rng_state(), cuda


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
    """The seed of a wrapped sampler's epoch: the epoch itself for seed 0, else a hash of both.

    ``seed + epoch`` would give seed 1 in epoch 1 what seed 2 has in epoch 0.
    """
    if seed == 0:
        return epoch
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:7], "big")


def _evenly_placed(topology: Topology) -> bool:
    """Whether all nodes have equally many processes, as far as this one can tell."""
    return topology.nproc_per_node * topology.nnodes == topology.world_size


def _is_plain(item: Any) -> bool:
    """Whether equal items have equal words for them."""
    return all(map(_is_plain, item)) if isinstance(item, (list, tuple)) else isinstance(item, (int, str))


def _compact(items: Sequence[Any]) -> Sequence[Any]:
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
