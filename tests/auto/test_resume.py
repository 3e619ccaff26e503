"""A loader goes on in the middle of an epoch: each sample that was not had yet, once, on any number of ranks."""

import itertools
import json
import pickle
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)

import idist
from idist.auto.data import auto_dataloader
from idist.auto.samplers import ShardSampler
from idist.errors import ConfigError
from idist.testing import run_processes, run_threads

LENGTH = 47


class Numbers(Dataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    """Another order in each epoch."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.epoch)
        yield from torch.randperm(self.length, generator=generator).tolist()


KINDS = ("sequential", "shuffled", "our sampler", "generator", "sampler", "batch_sampler", "no batches", "stream")


def make(kind: str, per_rank: int = 3, **more: Any) -> Any:
    """A loader of one of these kinds, on this rank."""
    # A generator for torch's own draw in each pass: ranks that are threads share the global one.
    batch = {"batch_size_per_rank": per_rank, **more}
    if kind == "sequential":
        return auto_dataloader(Numbers(LENGTH), **batch)
    if kind == "shuffled":
        return auto_dataloader(Numbers(LENGTH), shuffle=True, seed=5, **batch)
    if kind == "our sampler":
        return auto_dataloader(Numbers(LENGTH), sampler=ShardSampler(range(LENGTH), shuffle=True), **batch)
    if kind == "generator":
        seed = 100 + idist.get_rank()  # rank 0's counts
        return auto_dataloader(Numbers(LENGTH), shuffle=True, generator=torch.Generator().manual_seed(seed), **batch)
    if kind == "sampler":
        sampler = WeightedRandomSampler([1.0 + i % 3 for i in range(LENGTH)], LENGTH)
        return auto_dataloader(Numbers(LENGTH), sampler=sampler, seed=2, generator=torch.Generator(), **batch)
    if kind == "batch_sampler":
        batches = BatchSampler(RandomSampler(range(LENGTH)), 2, drop_last=False)
        more["generator"] = torch.Generator()
        return auto_dataloader(Numbers(LENGTH), batch_sampler=batches, shard=True, uneven="join", **more)
    if kind == "no batches":
        return auto_dataloader(Numbers(LENGTH), batch_size=None, shuffle=True, uneven="join", **more)
    return auto_dataloader(Stream(LENGTH), shard=True, **batch)


def numbers(batch: Any) -> list[int]:
    return torch.as_tensor(batch).flatten().tolist()


def first_steps(kind: str, epoch: int, steps: int, more: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
    """What this rank has in ``steps`` of ``epoch``, and its state then, as a file would have it."""
    loader = make(kind, **more)
    for _ in range(epoch):
        list(loader)
    had: list[int] = []
    for batch in itertools.islice(loader, steps):
        had += numbers(batch)
    return had, loader.state_dict()


def the_rest(kind: str, states: list[Any], more: dict[str, Any]) -> tuple[list[int], list[int]]:
    """What this rank has in the rest of the epoch, and in the next one."""
    loader = make(kind, **more)
    rank = idist.get_rank()
    loader.load_state_dict(states[rank] if rank < len(states) else None)
    return [i for batch in loader for i in numbers(batch)], [i for batch in loader for i in numbers(batch)]


def joined(parts: list[list[int]]) -> list[int]:
    return sorted(itertools.chain.from_iterable(parts))


@pytest.mark.parametrize(("before", "after"), [(8, 6), (2, 3), (1, 2), (2, 1), (3, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_sample_is_lost_or_repeated(kind: str, before: int, after: int) -> None:
    whole = joined([run_threads(first_steps, 1, kind, epoch, 10**6, {})[0][0] for epoch in (1,)])
    following = joined([run_threads(first_steps, 1, kind, 2, 10**6, {})[0][0]])
    most = -(-LENGTH // before // 3)
    for steps in sorted({0, 1, most - 1, most}):
        had, states = zip(*run_threads(first_steps, before, kind, 1, steps, {}), strict=True)
        rest, next_epoch = zip(*run_threads(the_rest, after, kind, list(states), {}), strict=True)
        assert joined([*had, *rest]) == whole
        assert joined(list(next_epoch)) == following


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "generator"])
def test_all_ranks_have_one_state(kind: str) -> None:
    """Where they have had equally many batches; so any rank may save it, as json too."""
    for steps in range(3):
        states = [state for _, state in run_threads(first_steps, 3, kind, 0, steps, {})]
        assert states == [states[0]] * 3
        assert json.loads(json.dumps(states[0])) == states[0]


@pytest.mark.parametrize("kind", ["shuffled", "stream"])
def test_the_state_is_of_what_was_given_not_of_what_workers_read(kind: str) -> None:
    """With workers, prefetching, persistent ones too, on another number of workers and ranks."""
    for persistent in (False, True):
        more = {"num_workers": 2, "prefetch_factor": 4, "persistent_workers": persistent}
        # Processes: workers that are forked while other threads run may never end.
        had, states = zip(*run_processes(first_steps, 2, kind, 1, 3, more, backend="gloo"), strict=True)
        assert {state["position"] for state in states} == {18}
        more["num_workers"] = 3
        rest, next_epoch = zip(*run_processes(the_rest, 3, kind, list(states), more, backend="gloo"), strict=True)
        assert joined([*had, *rest]) == joined(list(next_epoch)) == list(range(LENGTH))


def _in_processes(states: list[Any] | None) -> tuple[list[int], Any]:
    loader = make("sampler", num_workers=2)
    if states is not None:
        loader.load_state_dict(states[0] if idist.get_rank() == 0 else None)
        return [i for batch in loader for i in numbers(batch)], None
    had = [i for batch in itertools.islice(loader, 4) for i in numbers(batch)]
    return had, loader.state_dict()


def test_ranks_that_are_processes() -> None:
    """With a sampler whose order rank 0 tells, and the state saved and loaded by rank 0 alone: 2 ranks, then 3."""
    had, states = zip(*run_processes(_in_processes, 2, None, backend="gloo"), strict=True)
    rest, _ = zip(*run_processes(_in_processes, 3, list(states), backend="gloo"), strict=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = [i for batch in make("sampler") for i in numbers(batch)]
    assert joined([*had, *rest]) == sorted(whole)


def test_the_batches_are_those_of_a_run_that_was_not_interrupted() -> None:
    """On the same number of ranks: the same, in the same order, also with what drop_last leaves out."""
    for kind, drop_last in itertools.product(("shuffled", "stream"), (False, True)):
        loader = make(kind, drop_last=drop_last)
        run = [numbers(batch) for batch in loader] + [numbers(batch) for batch in loader]
        for steps in range(len(run) // 2 + 1):
            first = make(kind, drop_last=drop_last)
            began = [numbers(batch) for batch in itertools.islice(first, steps)]
            second = make(kind, drop_last=drop_last)
            second.load_state_dict(first.state_dict())
            ended = [numbers(batch) for batch in second]
            assert began + ended + [numbers(batch) for batch in second] == run


def test_after_the_last_batch_and_after_the_end() -> None:
    """In the body of the last step the epoch is not over; after the loop it is. Neither loses an epoch of the count."""
    loader, epochs, batch = make("shuffled", per_rank=10), [], None
    for batch in loader:  # noqa: B007
        epochs.append((loader.state_dict()["epoch"], loader.state_dict()["position"]))
    assert epochs[-2:] == [(0, 40), (0, 47)]
    ended = loader.state_dict()
    assert (ended["epoch"], ended["position"]) == (1, 0)
    again = make("shuffled", per_rank=10)
    again.load_state_dict({**ended, "epoch": 0, "position": 47})
    assert list(again) == []
    assert again.state_dict() == ended
    assert len(numbers(batch)) == 7


def test_a_rank_that_ends_early_is_not_believed() -> None:
    """Rank 1 has no batch in the last step, so its loop is over; the state of rank 0 counts for both."""

    def before() -> tuple[int, Any]:
        loader = auto_dataloader(Numbers(3), batch_size_per_rank=1, uneven="join")
        for number, _ in enumerate(loader, 1):
            if number == 2:
                break
        return len(loader), loader.state_dict()

    lengths, states = zip(*run_threads(before, 2), strict=True)
    assert lengths == (2, 1)
    assert [(state["epoch"], state["position"]) for state in states] == [(0, 3), (1, 0)]

    def after() -> tuple[list[int], list[int]]:
        loader = auto_dataloader(Numbers(3), batch_size_per_rank=1, uneven="join")
        loader.load_state_dict(states[idist.get_rank()])
        return [int(i) for i in loader], [int(i) for i in loader]

    assert run_threads(after, 2) == [([], [0, 2]), ([], [1])]


def test_epochs() -> None:
    """They go up by complete passes, whatever workers have read; setting the resumed one keeps the position."""
    loader = make("shuffled", num_workers=2, prefetch_factor=16)
    assert len(list(itertools.islice(loader, 3))) == 3
    assert loader.sampler.epoch == 0
    assert [len(list(loader)) for _ in range(2)] == [16, 16]
    assert loader.sampler.epoch == 2
    next(iter(loader))
    state = loader.state_dict()
    assert (state["epoch"], state["position"]) == (2, 3)
    loader.set_epoch(5)
    assert loader.state_dict()["epoch"] == 5
    loader.load_state_dict(state)
    loader.set_epoch(2)
    assert sum(len(batch) for batch in loader) == LENGTH - 3
    loader.load_state_dict(state)
    loader.sampler.set_epoch(4)
    assert sum(len(batch) for batch in loader) == LENGTH


def test_a_loader_can_be_pickled() -> None:
    loader = make("shuffled")
    wanted = [numbers(batch) for batch in pickle.loads(pickle.dumps(loader))]
    assert wanted == [numbers(batch) for batch in loader]


def test_two_passes_at_once() -> None:
    loader = make("shuffled")
    assert [one.tolist() == other.tolist() for one, other in zip(loader, loader, strict=True)] == [True] * 16


class OfThisRank(IterableDataset[int]):
    """Shards itself."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(idist.get_rank(), LENGTH, idist.get_world_size()))


@pytest.mark.parametrize("kind", ["dataset", "sampler", "generator"])
def test_data_that_differ_by_rank_already(kind: str) -> None:
    """Each rank has its own state; it means something to the same rank of the same number of ranks only."""

    def make_one() -> Any:
        if kind == "dataset":
            return auto_dataloader(OfThisRank(), batch_size_per_rank=3, shard=False)
        if kind == "sampler":
            sampler: Any = DistributedSampler(Numbers(LENGTH), idist.get_world_size(), idist.get_rank(), drop_last=True)
            sampler.set_epoch(1)
            return auto_dataloader(Numbers(LENGTH), batch_size_per_rank=3, sampler=sampler)
        generator = torch.Generator().manual_seed(idist.get_rank())
        return auto_dataloader(Numbers(9), sampler=RandomSampler(range(9), generator=generator), shard=False)

    def fn() -> None:
        whole = [numbers(batch) for batch in make_one()]
        first = make_one()
        began = [numbers(batch) for batch in itertools.islice(first, 2)]
        second = make_one()
        second.load_state_dict(first.state_dict())
        assert began + [numbers(batch) for batch in second] == whole

    run_threads(fn, 2)
    (state,) = run_threads(lambda: make_one().state_dict(), 1)
    with pytest.raises(ConfigError, match="world_size 1 in the state, 2 here"):
        run_threads(lambda: make_one().load_state_dict(state), 2)


def test_an_order_that_nobody_can_draw_again() -> None:
    with pytest.raises(ConfigError, match=r"RandomSampler draws from the program's random numbers.*a generator"):
        auto_dataloader(Numbers(4), shuffle=True, shard=False).state_dict()
    with pytest.raises(ConfigError, match="in_order=False"):
        auto_dataloader(Numbers(4), num_workers=1, in_order=False).state_dict()


class Unseeded(Sampler[int]):
    """Draws from somewhere that nobody seeds."""

    def __len__(self) -> int:
        return LENGTH

    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(range(LENGTH), LENGTH))


def test_a_sampler_that_draws_something_else_is_found_out() -> None:
    """On every rank, before a sample is lost or repeated."""

    def fn() -> None:
        first = auto_dataloader(Numbers(LENGTH), sampler=Unseeded(), batch_size_per_rank=3)
        next(iter(first))
        again = auto_dataloader(Numbers(LENGTH), sampler=Unseeded(), batch_size_per_rank=3)
        again.load_state_dict(first.state_dict())
        assert again.state_dict() == first.state_dict()
        with pytest.raises(ConfigError, match="Unseeded does not draw again what it drew in epoch 0"):
            list(again)
        again.set_epoch(1)
        assert len(list(again)) == len(again)

    for world_size in (1, 2):
        run_threads(fn, world_size)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            lambda: auto_dataloader(Numbers(48), batch_size_per_rank=3, shuffle=True, seed=5),
            "length 47 in the state, 48 here",
        ),
        (
            lambda: auto_dataloader(Numbers(47), batch_size_per_rank=3, shuffle=True, seed=6),
            "seed 5 in the state, 6 here",
        ),
        (lambda: auto_dataloader(Numbers(47), batch_size_per_rank=3, seed=5), "shuffle True in the state, False here"),
        (lambda: make("sampler"), "'ShardSampler' in the"),
        (lambda: auto_dataloader(Stream(47), shard=True), "'ShardedIterable' here"),
    ],
)
def test_a_state_of_another_order_is_the_same_error_on_every_rank(other: Any, says: str) -> None:
    state = make("shuffled").state_dict()

    def fn() -> str:
        with pytest.raises(ConfigError, match="another order than this loader's: .*" + says) as caught:
            other().load_state_dict(state if idist.get_rank() == 0 else None)
        return str(caught.value)

    first, second = run_threads(fn, 2)
    assert first == second


@pytest.mark.parametrize("wrong", [None, {}, {"epoch": 1}, 7])
def test_not_a_state(wrong: Any) -> None:
    def fn() -> None:
        make("shuffled").load_state_dict(wrong)

    for world_size in (1, 2):
        with pytest.raises(ConfigError, match="takes what state_dict of such a loader returned, got"):
            run_threads(fn, world_size)
