"""A data loader that gives each rank its share of the data."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    IterDataPipe,
    RandomSampler,
)

from idist import runtime
from idist.auto.iterable import ShardedIterable, SteppedIterable
from idist.auto.loader import AsItIs, Loader
from idist.auto.prefetch import OnDevice
from idist.auto.samplers import DistributedProxySampler, ShardSampler, Sharing, number_of_steps, share_of
from idist.errors import ConfigError, UnknownArgument, did_you_mean

__all__ = ["ShardedIterable", "auto_dataloader"]

logger = logging.getLogger("idist")

_OPTIONS = tuple(inspect.signature(DataLoader.__init__).parameters)[2:]
"""The keyword arguments of torch's DataLoader, without ``self`` and ``dataset``."""
_OURS = ("batch_size_per_rank", "prefetch_to_device", "seed", "shard", "uneven")
_UNEVEN = ("pad", "drop", "join")


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """This rank, and how the data are to be shared out over all of them.

    ``notes`` collects what rank 0 is to warn of for all, ``own_notes`` what only this rank can.
    """

    rank: int
    world_size: int
    uneven: str | None
    seed: int
    shard: bool | None
    drop_last: bool
    notes: list[str] = dataclasses.field(default_factory=list)
    own_notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def pad(self) -> bool:
        return self.uneven == "pad"

    @property
    def drop(self) -> bool:
        return self.uneven == "drop" or self.drop_last


def auto_dataloader(
    dataset: Any,
    *,
    batch_size_per_rank: int | None = None,
    uneven: Literal["pad", "drop", "join"] | None = None,
    seed: int = 0,
    shard: bool | None = None,
    prefetch_to_device: bool = False,
    **kwargs: Any,
) -> Loader:
    """A DataLoader over this rank's share of ``dataset``. Every rank calls it with the same arguments.

    It means the same at every world size, also for one process:

    - ``batch_size`` is that of all ranks together. Each rank takes the world-size-th part of it, at least 1. If that
      does not come out even, a warning names the effective global batch. Left out, each rank takes 1; ``None`` (no
      batches) stays ``None``.
    - ``num_workers`` is that of all processes of this node together; each gets its part, rounded up.
    - ``shuffle`` is False unless given, as in torch. (The older API shuffled by default, with several ranks only.)
      The order is a function of ``(seed, epoch)``, is the same on every number of ranks, and touches no global
      random state; a billion samples take no time and no memory. With a ``generator`` it is what a RandomSampler
      draws with it, on rank 0.
    - ``sampler`` is shared out by :class:`idist.DistributedProxySampler`: rank 0's order counts, and beginning an
      epoch is then a collective, of one broadcast. A torch DistributedSampler is used as it is.
    - ``batch_sampler`` cannot be split without knowing whether its batches differ by rank already: with several
      ranks say ``shard=True`` or ``shard=False``, unless it is around a DistributedSampler.
    - An IterableDataset is shared out item by item, see :class:`~idist.auto.data.ShardedIterable`.
    - ``pin_memory`` is True unless given where the device is a CUDA device.

    ``loader.set_epoch(epoch)`` sets the epoch; left out, it goes up by itself with each complete pass.
    ``loader.state_dict()`` and ``loader.load_state_dict(state)`` go on in the middle of an epoch, see :class:`Loader`.

    **Uneven data.** Each sample comes exactly once, and all ranks have equally many batches: where the last samples
    do not suffice for all, ranks give one of their last full batch a step later. So an evaluation is exact, and no
    rank waits in training for one that has ended. Of the last two batches some are smaller. With one sample per
    rank and step, or fewer samples than ranks, that is impossible, and a warning says so; ``uneven`` accepts it.

    Args:
        dataset: map-style (``__getitem__`` and ``__len__``) or an IterableDataset.
        batch_size_per_rank: in place of ``batch_size``, of each rank alone.
        uneven: what else to do where the samples do not divide by the world size. "pad" repeats up to world size - 1
            of the first samples, "drop" leaves out as many of the last (``drop_last=True`` all of the last
            incomplete batch), "join" accepts that ranks have more batches than others, as in a loop within
            :func:`idist.join`.
        seed: of the order.
        shard: False leaves the dataset, the sampler or the batch sampler as it is, because what it gives differs by
            rank already, or is meant to be the same on all. True says it does not: an IterableDataset is then
            shared out without a warning, and a batch sampler by whole batches, world size of them in each step.
        prefetch_to_device: give batches that are on :func:`idist.device`; on a CUDA device the next one is
            copied while this one is in use. (A backend whose devices need it does so in any case.)
        **kwargs: of torch's DataLoader, all of them.

    Returns:
        A torch DataLoader, of the class :class:`Loader`.

    Raises:
        UnknownArgument: an argument that neither we nor torch's DataLoader know.
        TypeError: not a dataset.
        ConfigError: arguments that cannot be used, or not together; also ``uneven`` and ``seed`` where they would
            have no effect.
        LaunchError: ``num_workers`` is to be divided but the node is not known; says what to do.

    Cost: no collective; with a sampler of yours one broadcast in each epoch.
    """
    context = runtime.current()
    if batch_size_per_rank is not None:
        kwargs = _of_all_ranks(batch_size_per_rank, kwargs, context.world_size)
    _check_arguments(dataset, uneven, shard, kwargs)
    plan = _Plan(context.rank, context.world_size, uneven, seed, shard, bool(kwargs.get("drop_last", False)))
    options = _divided(kwargs, plan)
    options.setdefault("pin_memory", context.backend.device().type == "cuda")
    shared = _share(dataset, options, plan)
    loader = Loader(
        dataset if not isinstance(shared, SteppedIterable) else shared,
        shared=shared,
        fed_by=partial(_feed, prefetch_to_device),
        facts=partial(_facts, plan=plan),
        **options,
    )
    for note in [*(plan.notes if plan.rank == 0 else []), *plan.own_notes]:
        warnings.warn(note, stacklevel=2)
    logger.info("%r", loader)
    return loader


def _feed(prefetch: bool, batches: Iterable[Any]) -> Iterable[Any]:
    """What brings batches to the device: the backend's own, else ours where it is asked for."""
    backend = runtime.current().backend
    fed = backend.wrap_loader(batches)
    device = backend.device()
    if prefetch and fed is batches and device.type != "cpu":
        return OnDevice(batches, device)
    return fed


def _check_arguments(dataset: object, uneven: object, shard: object, kwargs: dict[str, Any]) -> None:
    for name in kwargs:
        if name not in _OPTIONS:
            raise UnknownArgument(
                f"auto_dataloader does not know the argument {name!r}.{did_you_mean(name, (*_OPTIONS, *_OURS))}"
            )
    if not isinstance(dataset, IterableDataset) and not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"auto_dataloader needs a dataset with __getitem__ and __len__, or an IterableDataset, got {dataset!r}"
        )
    if uneven not in (None, *_UNEVEN):
        raise ConfigError(f"uneven must be one of {', '.join(map(repr, _UNEVEN))} or None, got {uneven!r}")
    if shard is not None and not isinstance(shard, bool):
        raise ConfigError(f"shard must be True, False or None, got {shard!r}")
    for name, least in (("batch_size", 1), ("num_workers", 0)):
        number = kwargs.get(name, least)
        if number is None and name == "batch_size":
            continue
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            raise ConfigError(f"{name} must be an integer of at least {least}, got {number!r}")


def _of_all_ranks(batch_size_per_rank: object, kwargs: dict[str, Any], world_size: int) -> dict[str, Any]:
    if "batch_size" in kwargs:
        raise ConfigError(
            "batch_size is of all ranks together and batch_size_per_rank of each alone: give one of them, got "
            f"batch_size={kwargs['batch_size']!r} and batch_size_per_rank={batch_size_per_rank!r}"
        )
    if not isinstance(batch_size_per_rank, int) or isinstance(batch_size_per_rank, bool) or batch_size_per_rank < 1:
        raise ConfigError(f"batch_size_per_rank must be an integer of at least 1, got {batch_size_per_rank!r}")
    return {**kwargs, "batch_size": batch_size_per_rank * world_size}


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
        options["num_workers"] = -(-options["num_workers"] // runtime.current().nodes.nproc_per_node)
    return options


def _share(dataset: Any, options: dict[str, Any], plan: _Plan) -> Sharing | SteppedIterable | AsItIs:
    """This rank's share; the sampler or batch sampler that makes it is put into the options."""
    shared: Sharing | SteppedIterable | AsItIs
    if isinstance(dataset, IterableDataset):
        return _share_iterable(dataset, options, plan)
    if options.get("batch_sampler") is not None:
        shared = _share_batch_sampler(options["batch_sampler"], plan)
        options["batch_sampler"] = shared.source if isinstance(shared, AsItIs) else shared
        return shared
    shared = _share_samples(dataset, options, plan)
    options["sampler"] = shared.source if isinstance(shared, AsItIs) else shared
    options["shuffle"] = None if options["sampler"] is not None else options.get("shuffle")
    return shared


def _share_samples(dataset: Any, options: dict[str, Any], plan: _Plan) -> Sharing | AsItIs:
    """``AsItIs`` of ``None`` leaves the choice of a sampler to torch."""
    sampler, shuffle = options.get("sampler"), bool(options.get("shuffle"))
    size = options.get("batch_size", 1)
    if sampler is not None and shuffle:
        raise ConfigError("sampler and shuffle=True exclude each other: the sampler makes the order")
    if isinstance(sampler, DistributedSampler):
        return _distributed_already(sampler, size, plan)
    if plan.shard is False:
        _refuse_what_cannot_reach(plan, "what shard=False leaves as it is")
        return _as_it_is(sampler, size, plan)
    if sampler is None and not hasattr(dataset, "__len__"):
        raise TypeError(f"a dataset without a length needs a sampler, got {type(dataset).__name__}")
    if sampler is None and shuffle and options.get("generator") is not None:
        sampler = RandomSampler(dataset, generator=options["generator"])
    if sampler is not None:
        return _proxy(sampler, size, plan)
    _note_uneven(len(dataset), size, plan)
    return ShardSampler(dataset, plan.world_size, plan.rank, shuffle, plan.seed, plan.drop, plan.pad)


def _share_batch_sampler(batch_sampler: Any, plan: _Plan) -> Sharing | AsItIs:
    inner = getattr(batch_sampler, "sampler", None)
    if isinstance(batch_sampler, DistributedSampler):
        return _distributed_already(batch_sampler, None, plan)
    if isinstance(inner, DistributedSampler):
        _check(inner, plan)
        return _as_it_is(batch_sampler, None, plan)
    if plan.shard is None and plan.world_size > 1:
        raise ConfigError(
            f"a batch_sampler on {plan.world_size} ranks: say shard=True to share its batches out over the ranks "
            f"(each step then takes {plan.world_size} of them), or shard=False if its batches differ by rank already"
        )
    if not plan.shard:
        _refuse_what_cannot_reach(plan, "a batch sampler without shard=True")
        return _as_it_is(batch_sampler, None, plan)
    return _proxy(batch_sampler, None, plan)


def _proxy(sampler: Any, size: int | None, plan: _Plan) -> DistributedProxySampler:
    proxy = DistributedProxySampler(sampler, plan.world_size, plan.rank, plan.seed, plan.drop, plan.pad)
    _note_uneven(len(sampler), size, plan)
    return proxy


def _as_it_is(source: Any, size: int | None, plan: _Plan) -> AsItIs:
    return AsItIs(source, plan.rank, plan.world_size, size)


def _distributed_already(sampler: DistributedSampler[Any], size: int | None, plan: _Plan) -> Sharing | AsItIs:
    """One of ours knows its position in the order of all ranks."""
    _check(sampler, plan)
    if isinstance(sampler, Sharing) and (sampler.rank, sampler.num_replicas) == (plan.rank, plan.world_size):
        return sampler
    return _as_it_is(sampler, size, plan)


def _check(sampler: DistributedSampler[Any], plan: _Plan) -> None:
    """A sampler that the user distributed."""
    _refuse_what_cannot_reach(plan, f"a {type(sampler).__name__} of yours, which has arguments for it")
    theirs, ours = (sampler.rank, sampler.num_replicas), (plan.rank, plan.world_size)
    # No error, since the ranks of one model replica may share their data.
    if theirs != ours:
        plan.own_notes.append(
            f"the {type(sampler).__name__} is for rank {theirs[0]} of {theirs[1]}, this process is rank {ours[0]} of "
            f"{ours[1]}; it is used as it is"
        )


def _refuse_what_cannot_reach(plan: _Plan, what: str) -> None:
    if plan.uneven not in (None, "join") or plan.seed != 0:
        raise ConfigError(
            f"uneven and seed do not reach {what}; leave them out, got uneven={plan.uneven!r}, seed={plan.seed}"
        )


def _note_uneven(length: int, size: int | None, plan: _Plan) -> None:
    """Where ranks cannot have equally many batches, one that has ended lets the others wait in training."""
    n = plan.world_size
    shares = [share_of(rank, length, n, pad=plan.pad, drop=plan.drop) for rank in (0, n - 1)]
    most, least = (number_of_steps(mine, shares[0], size or 1, drop_last=plan.drop_last) for mine in shares)
    if most != least and plan.uneven is None:
        plan.notes.append(
            f"{length} on {n} ranks, {size or 1} a step and rank: rank 0 has {most} steps and the last "
            f"rank {least}, and in training one would wait for the other. uneven='join' accepts this (see idist.join), "
            "'pad' repeats some, 'drop' leaves the last ones out"
        )


def _share_iterable(dataset: IterableDataset[Any], options: dict[str, Any], plan: _Plan) -> SteppedIterable | AsItIs:
    # A datapipe is shared out by torch, at its sharding_filter.
    if plan.shard is False or (plan.shard is None and isinstance(dataset, IterDataPipe)):
        _refuse_what_cannot_reach(plan, "a dataset that shards itself")
        return _as_it_is(dataset, options.get("batch_size", 1), plan)
    if plan.shard is None and plan.world_size > 1:
        plan.notes.append(
            f"{type(dataset).__name__} is iterable: every rank reads all of it and keeps one item in "
            f"{plan.world_size}. shard=True accepts this, shard=False leaves a dataset that shards itself as it is"
        )
    return SteppedIterable(
        dataset,
        num_replicas=plan.world_size,
        rank=plan.rank,
        batch_size=options.get("batch_size", 1) or 1,
        drop_last=plan.drop,
        drop_last_batch=plan.drop_last,
        pad=plan.pad,
    )


def _facts(loader: Loader, plan: _Plan) -> str:
    size = loader.batch_size
    facts = [f"batch_size {size}" + ("" if size is None else f" of {size * plan.world_size}")]
    facts.append(f"num_workers {loader.num_workers}")
    if not isinstance(loader.dataset, IterableDataset):
        facts.append(f"{len(loader)} batches" if loader.batch_sampler is not None else f"{len(loader)} samples")
        facts.append(f"order by {type(loader.sampler).__name__}")
    facts.append(f"uneven: {'drop' if plan.drop else plan.uneven or 'each once'}")
    return f"rank {plan.rank} of {plan.world_size} takes {', '.join(facts)}"
