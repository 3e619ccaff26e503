"""A data loader that gives each rank its share of the data."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    IterDataPipe,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)
from torch.utils.data._utils import worker as torch_worker

from idist import runtime
from idist.auto.samplers import DistributedProxySampler, ShardSampler
from idist.errors import ConfigError, UnknownArgument, did_you_mean

__all__ = ["ShardedIterable", "auto_dataloader"]

logger = logging.getLogger("idist")

_OPTIONS = tuple(inspect.signature(DataLoader.__init__).parameters)[2:]
"""The keyword arguments of torch's DataLoader, without ``self`` and ``dataset``."""
_OURS = ("pad", "seed", "shard")


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """This rank, and how the data are to be shared out over all of them; ``notes`` collects what to warn of."""

    rank: int
    world_size: int
    pad: bool | None
    seed: int
    shard: bool | None
    drop_last: bool
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def padded(self) -> bool:
        return self.pad is not False and not self.drop_last


def auto_dataloader(
    dataset: Any, *, pad: bool | None = None, seed: int = 0, shard: bool | None = None, **kwargs: Any
) -> DataLoader[Any]:
    """A DataLoader over this rank's share of ``dataset``. Every rank calls it with the same arguments.

    It means the same at every world size, also for one process:

    - ``batch_size`` is that of all ranks together. Each rank takes the world-size-th part of it, at least 1. If that
      does not come out even, a warning names the effective global batch. Left out, each rank takes 1; ``None`` (no
      batches) stays ``None``.
    - ``num_workers`` is that of all processes of this node together; each gets its part, rounded up.
    - ``shuffle`` is False unless given, as in torch. (The older API shuffled by default, with several ranks only.)
      The order is a function of ``(seed, epoch)``, is the same on every number of ranks, and touches no global
      random state. With a ``generator`` it is what a RandomSampler draws with it, on rank 0.
    - ``sampler`` is shared out by :class:`idist.DistributedProxySampler`: rank 0's order counts, and beginning an
      epoch is then a collective, of one broadcast. A torch DistributedSampler is used as it is.
    - ``batch_sampler`` cannot be split without knowing whether its batches differ by rank already: with several
      ranks say ``shard=True`` or ``shard=False``, unless it is around a DistributedSampler.
    - An IterableDataset is shared out item by item, see :class:`ShardedIterable`.
    - ``pin_memory`` is True unless given where the device is a CUDA device.

    ``loader.sampler.set_epoch(epoch)`` sets the epoch (``loader.batch_sampler`` with one of yours); left out, the
    epoch goes up by itself with each complete pass.

    **Uneven data.** Ranks with different numbers of batches hang in training, and with some models in evaluation
    too. So by default all ranks get equally many samples: ``drop_last=True`` leaves out up to world size - 1
    samples, besides the last incomplete batch of each rank; otherwise as many are repeated, and where that would
    make an evaluation wrong, a warning says how many. ``pad=False`` gives each sample exactly once: for evaluation
    that sums up at the end.

    Args:
        dataset: map-style (``__getitem__`` and ``__len__``) or an IterableDataset.
        pad: True repeats samples, without a warning; False gives each sample exactly once. ``drop_last=True``
            goes before.
        seed: of the order.
        shard: False leaves the dataset, the sampler or the batch sampler as it is, because what it gives differs by
            rank already, or is meant to be the same on all. True says it does not: an IterableDataset is then
            shared out without a warning, and a batch sampler by whole batches, world size of them in each step.
        **kwargs: of torch's DataLoader, all of them.

    Returns:
        A torch DataLoader, or what the backend makes of it.

    Raises:
        UnknownArgument: an argument that neither we nor torch's DataLoader know.
        TypeError: not a dataset.
        ConfigError: arguments that cannot be used, or not together; also ``pad`` and ``seed`` where they would have
            no effect.
        LaunchError: ``num_workers`` is to be divided but the node is not known; says what to do.

    Cost: no collective; with a sampler of yours one broadcast in each epoch.
    """
    _check_arguments(dataset, pad, shard, kwargs)
    context = runtime.current()
    plan = _Plan(context.rank, context.world_size, pad, seed, shard, bool(kwargs.get("drop_last", False)))
    options = _divided(kwargs, plan)
    options.setdefault("pin_memory", context.backend.device().type == "cuda")
    if isinstance(dataset, IterableDataset):
        dataset = _share_iterable(dataset, options, plan)
    elif options.get("batch_sampler") is not None:
        options["batch_sampler"] = _share_batch_sampler(options["batch_sampler"], plan)
    else:
        options["sampler"] = _share_samples(dataset, options, plan)
        options["shuffle"] = None if options["sampler"] is not None else options.get("shuffle")
    loader: DataLoader[Any] = DataLoader(dataset, **options)
    if plan.rank == 0:
        for note in plan.notes:
            warnings.warn(note, stacklevel=2)
    logger.info("%s", _Summary(loader, plan))
    # On XLA it is another class with the same use; users know the type of all the rest.
    return cast("DataLoader[Any]", context.backend.wrap_loader(loader))


def _check_arguments(dataset: object, pad: object, shard: object, kwargs: dict[str, Any]) -> None:
    for name in kwargs:
        if name not in _OPTIONS:
            raise UnknownArgument(
                f"auto_dataloader does not know the argument {name!r}.{did_you_mean(name, (*_OPTIONS, *_OURS))}"
            )
    if not isinstance(dataset, IterableDataset) and not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"auto_dataloader needs a dataset with __getitem__ and __len__, or an IterableDataset, got {dataset!r}"
        )
    for name, said in (("pad", pad), ("shard", shard)):
        if said is not None and not isinstance(said, bool):
            raise ConfigError(f"{name} must be True, False or None, got {said!r}")
    for name, least in (("batch_size", 1), ("num_workers", 0)):
        number = kwargs.get(name, least)
        if number is None and name == "batch_size":
            continue
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ConfigError(f"{name} must be an integer of at least {least}, got {number!r}")


def _divided(kwargs: dict[str, Any], plan: _Plan) -> dict[str, Any]:
    """The options with this rank's part of the batch and of the workers."""
    options = dict(kwargs)
    asked = options.get("batch_size")
    if asked is not None and options.get("batch_sampler") is None:
        options["batch_size"] = mine = max(1, asked // plan.world_size)
        if mine * plan.world_size != asked:
            plan.notes.append(
                f"batch_size={asked} does not divide by world size {plan.world_size}: each rank takes {mine}, "
                f"so the effective global batch is {mine * plan.world_size}"
            )
    if options.get("num_workers"):
        # Rounded up, so never 0: persistent_workers and the like, which need a worker, stay right.
        options["num_workers"] = -(-options["num_workers"] // runtime.placed().topology.nproc_per_node)
    return options


def _share_samples(dataset: Any, options: dict[str, Any], plan: _Plan) -> Any:
    """The sampler of this rank, ``None`` to leave the choice to torch."""
    sampler, shuffle = options.get("sampler"), bool(options.get("shuffle"))
    if sampler is not None and shuffle:
        raise ConfigError("sampler and shuffle=True exclude each other: the sampler makes the order")
    if isinstance(sampler, DistributedSampler):
        return _checked(sampler, plan)
    if plan.shard is False:
        _refuse_what_cannot_reach(plan, "what shard=False leaves as it is")
        return sampler
    if sampler is None and not hasattr(dataset, "__len__"):
        raise TypeError(f"a dataset without a length needs a sampler, got {type(dataset).__name__}")
    if sampler is None and shuffle and options.get("generator") is not None:
        sampler = RandomSampler(dataset, generator=options["generator"])
    shared: ShardSampler | DistributedProxySampler
    if sampler is None:
        shared = ShardSampler(
            dataset, plan.world_size, plan.rank, shuffle, plan.seed, plan.drop_last, plan.pad is not False
        )
    else:
        shared = _proxy(sampler, plan)
    # In a random order a sample drawn twice is training as usual; anything else may be an evaluation.
    if not shuffle and not isinstance(sampler, (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)):
        _note_padding(dataset if sampler is None else sampler, "samples", plan)
    return shared


def _share_batch_sampler(batch_sampler: Any, plan: _Plan) -> Any:
    inner = getattr(batch_sampler, "sampler", None)
    if isinstance(batch_sampler, DistributedSampler):
        return _checked(batch_sampler, plan)
    if isinstance(inner, DistributedSampler):
        _checked(inner, plan)
        return batch_sampler
    if plan.shard is None and plan.world_size > 1:
        raise ConfigError(
            f"a batch_sampler on {plan.world_size} ranks: say shard=True to share its batches out over the ranks "
            f"(each step then takes {plan.world_size} of them), or shard=False if its batches differ by rank already"
        )
    if not plan.shard:
        _refuse_what_cannot_reach(plan, "a batch sampler without shard=True")
        return batch_sampler
    _note_padding(batch_sampler, "batches", plan)
    return _proxy(batch_sampler, plan)


def _proxy(sampler: Any, plan: _Plan) -> DistributedProxySampler:
    return DistributedProxySampler(
        sampler, plan.world_size, plan.rank, plan.seed, plan.drop_last, plan.pad is not False
    )


def _checked(sampler: DistributedSampler[Any], plan: _Plan) -> DistributedSampler[Any]:
    """A sampler that the user distributed."""
    _refuse_what_cannot_reach(plan, f"a {type(sampler).__name__} of yours, which has arguments for it")
    theirs, ours = (sampler.rank, sampler.num_replicas), (plan.rank, plan.world_size)
    # No error, since the ranks of one model replica may share their data; and on the rank that differs, not on rank 0.
    if theirs != ours:
        warnings.warn(
            f"the {type(sampler).__name__} is for rank {theirs[0]} of {theirs[1]}, this process is rank {ours[0]} of "
            f"{ours[1]}; it is used as it is",
            stacklevel=4,
        )
    return sampler


def _refuse_what_cannot_reach(plan: _Plan, what: str) -> None:
    if plan.pad is not None or plan.seed != 0:
        raise ConfigError(f"pad and seed do not reach {what}; leave them out, got pad={plan.pad}, seed={plan.seed}")


def _note_padding(source: Sized, what: str, plan: _Plan) -> None:
    missing = -len(source) % plan.world_size
    if missing and plan.pad is None and plan.padded:
        plan.notes.append(
            f"{len(source)} {what} do not divide by world size {plan.world_size}: {missing} will be repeated. "
            "pad=False gives each exactly once, drop_last=True leaves the last ones out, pad=True accepts this"
        )


def _share_iterable(dataset: IterableDataset[Any], options: dict[str, Any], plan: _Plan) -> IterableDataset[Any]:
    # A datapipe is shared out by torch, at its sharding_filter.
    if plan.shard is False or (plan.shard is None and isinstance(dataset, IterDataPipe)):
        _refuse_what_cannot_reach(plan, "a dataset that shards itself")
        return dataset
    if plan.shard is None and plan.world_size > 1:
        plan.notes.append(
            f"{type(dataset).__name__} is iterable: every rank reads all of it and keeps one item in "
            f"{plan.world_size}. shard=True accepts this, shard=False leaves a dataset that shards itself as it is"
        )
    return ShardedIterable(
        dataset,
        num_replicas=plan.world_size,
        rank=plan.rank,
        batch_size=options.get("batch_size", 1) or 1,
        drop_last=plan.drop_last,
        pad=plan.padded,
    )


class ShardedIterable(IterableDataset[Any]):
    """One rank's share of an iterable dataset: every ``num_replicas``-th item, each item on one rank.

    Every process, DataLoader workers included, reads the whole stream and keeps its part, so **the stream has to be
    the same in every process**: one that shuffles must do so by a seed of its own. Within a rank the workers
    take turns by batches, so that the batches and their order are those of a loader without workers.

    The dataset does not see DataLoader's workers: ``get_worker_info()`` is None while it is iterated. A dataset
    that splits itself over the workers of one process is therefore right here too. One that splits itself over
    ranks is not: do not wrap it (``shard=False``).

    Attributes that are read here and do not exist come from the dataset; ``set_epoch`` is one, where it has it.

    Args:
        dataset: the whole stream.
        num_replicas: number of ranks.
        rank: this process's.
        batch_size: of this rank's loader, 1 without batches.
        drop_last: leave out the last items that would not reach all ranks.
        pad: a rank without an item in the last round repeats its first one (or, if it never had any, another of
            the stream). ``drop_last=True`` goes before. With neither, some ranks have one item less.

    Cost: no collective. Memory for two items.
    """

    def __init__(
        self,
        dataset: IterableDataset[Any],
        *,
        num_replicas: int,
        rank: int,
        batch_size: int = 1,
        drop_last: bool = False,
        pad: bool = True,
    ) -> None:
        self.dataset = dataset
        self.num_replicas = num_replicas
        self.rank = rank
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.pad = pad and not drop_last

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        index, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for position, item in enumerate(self._of_this_rank()):
            if position // self.batch_size % count == index:
                yield item

    def __len__(self) -> int:
        """Items of this rank, if the dataset has a length."""
        length = len(self.dataset)  # type: ignore[arg-type]  # raises TypeError, as torch's loader expects
        if self.pad:
            return -(-length // self.num_replicas)
        if self.drop_last:
            return length // self.num_replicas
        return len(range(self.rank, length, self.num_replicas))

    def __getattr__(self, name: str) -> Any:
        # Pickling and copying ask for such names, for this object and before it has a dataset.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def _of_this_rank(self) -> Iterator[Any]:
        stream = _unsplit(self.dataset)
        spare: list[Any] | None = None
        while True:
            size, mine, latest = 0, [], []
            for item in islice(stream, self.num_replicas):
                if size <= self.rank:
                    latest = [item]
                if size == self.rank:
                    mine = latest
                size += 1
            spare = latest if spare is None else spare
            if size == self.num_replicas:
                yield from mine
                continue
            if size and not self.drop_last:
                yield from mine or (spare if self.pad else [])
            return


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


class _Summary:
    """The log line, made only if it is logged."""

    def __init__(self, loader: DataLoader[Any], plan: _Plan) -> None:
        self.loader = loader
        self.plan = plan

    def __str__(self) -> str:
        loader, plan = self.loader, self.plan
        facts = [f"batch_size {loader.batch_size}", f"num_workers {loader.num_workers}"]
        if not isinstance(loader.dataset, IterableDataset):
            facts.append(f"{len(loader)} batches" if loader.batch_sampler is not None else f"{len(loader)} samples")
            facts.append(f"order by {type(loader.sampler).__name__}")
        uneven = "drop" if plan.drop_last else "pad" if plan.padded else "keep"
        facts.append(f"uneven: {uneven}")
        return f"auto_dataloader: rank {plan.rank} of {plan.world_size} takes " + ", ".join(facts)
