"""auto_dataloader: each rank's share of the data, of the batch and of the workers."""

import copy
import gc
import itertools
import logging
import pickle
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    IterDataPipe,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from idist import runtime
from idist.auto.data import ShardedIterable, auto_dataloader
from idist.auto.loader import Loader
from idist.auto.samplers import DistributedProxySampler, ShardSampler
from idist.backends.serial import Serial
from idist.errors import ConfigError, LaunchError, UnknownArgument
from idist.runtime import Context
from idist.testing import run_processes, run_threads
from idist.topology import Topology

WORLD_SIZES = range(1, 6)


class Numbers(Dataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))


class SizedStream(Stream):
    def __len__(self) -> int:
        return self.length


class SplitStream(Stream):
    """Splits itself over the workers of its process, as torch's documentation shows."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        yield from range(self.length) if info is None else range(info.id, self.length, info.num_workers)


@contextmanager
def at(rank: int, world_size: int, *, nproc: int | None = None, backend: Any = None) -> Iterator[None]:
    """This thread is one of ``world_size`` ranks, of which the others never come."""
    nproc = world_size if nproc is None else nproc
    topology = Topology("test", rank, world_size, rank % nproc, nproc, rank // nproc, -(-world_size // nproc))
    with runtime.thread_context(Context(backend or Serial(), topology, owned=False)):
        yield


def loaders(dataset: Any, world_size: int, **options: Any) -> list[DataLoader[Any]]:
    made = []
    for rank in range(world_size):
        with at(rank, world_size):
            made.append(auto_dataloader(dataset, **options))
    return made


def samples(loader: Any) -> list[int]:
    return [sample for batch in loader for sample in torch.as_tensor(batch).flatten().tolist()]


def all_samples(dataset: Any, world_size: int, **options: Any) -> list[int]:
    return sorted(sample for loader in loaders(dataset, world_size, **options) for sample in samples(loader))


# Batches and workers


@pytest.mark.parametrize(("asked", "world_size", "mine"), [(64, 1, 64), (64, 2, 32), (8, 4, 2), (3, 3, 1)])
def test_batch_size_is_that_of_all_ranks(asked: int, world_size: int, mine: int) -> None:
    for loader in loaders(Numbers(120), world_size, batch_size=asked):
        assert loader.batch_size == mine
        assert len(next(iter(loader))) == mine


@pytest.mark.parametrize(
    ("asked", "world_size", "mine", "effective"), [(3, 2, 1, 2), (10, 4, 2, 8), (2, 3, 1, 3), (1, 5, 1, 5)]
)
def test_a_batch_that_does_not_divide_warns_once(asked: int, world_size: int, mine: int, effective: int) -> None:
    """Row 8: the warning names the effective global batch; a batch below the world size is not multiplied."""
    with pytest.warns(UserWarning, match=f"batch_size={asked} .* global batch is {effective}$") as caught:
        made = loaders(Numbers(60), world_size, batch_size=asked)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert {loader.batch_size for loader in made} == {mine}


def test_no_batch_size_is_one_sample_per_rank() -> None:
    assert {loader.batch_size for loader in loaders(Numbers(9), 3)} == {1}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_batch_size_none(world_size: int) -> None:
    """Row 8: no batches, and the samples are shared out all the same."""
    made = loaders(Numbers(60), world_size, batch_size=None)
    assert {loader.batch_size for loader in made} == {None}
    assert sorted(i for loader in made for i in loader) == list(range(60))


@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["alone", "workers"])
@pytest.mark.parametrize("kind", [Numbers, Stream])
def test_a_loader_ends_with_its_last_reference(kind: type[Any], options: dict[str, Any]) -> None:
    """Not when the collector comes: then torch waits 5 s for each worker."""
    gc.disable()
    try:
        loader = auto_dataloader(kind(40), batch_size=8, **options, **({"shard": True} if kind is Stream else {}))
        next(iter(loader))
        gone = weakref.ref(loader)
        del loader
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("asked", "nproc", "mine"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (6, 2, 3), (2, 1, 2), (3, 8, 1)]
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_num_workers_is_that_of_the_node(asked: int, nproc: int, mine: int) -> None:
    with at(1, 8, nproc=nproc):
        assert auto_dataloader(Numbers(8), num_workers=asked).num_workers == mine


def test_workers_cannot_be_divided_where_the_node_is_unknown() -> None:
    unplaced = Context(Serial(), Topology("made by hand", 0, 2), owned=False)
    with runtime.thread_context(unplaced):
        assert auto_dataloader(Numbers(8)).num_workers == 0
        with pytest.raises(LaunchError, match=r"idist\.sync"):
            auto_dataloader(Numbers(8), num_workers=2)


def test_options_that_need_a_worker_still_have_one() -> None:
    with at(0, 2):
        loader = auto_dataloader(Numbers(8), num_workers=1, persistent_workers=True, prefetch_factor=3, timeout=9)
    assert (loader.num_workers, loader.persistent_workers, loader.prefetch_factor, loader.timeout) == (1, True, 3, 9)


# Order, padding


def test_shuffle_has_one_default_everywhere() -> None:
    """Row 7: it was True on several ranks, False on one."""
    for world_size in WORLD_SIZES:
        made = loaders(Numbers(60), world_size)
        assert [samples(loader) for loader in made] == [list(range(r, 60, world_size)) for r in range(world_size)]


def test_the_same_use_on_every_number_of_ranks() -> None:
    """A script sets the epoch and finds the same kinds of things at every world size."""
    for world_size in WORLD_SIZES:
        for loader in loaders(Numbers(60), world_size, shuffle=True, seed=3):
            assert type(loader) is Loader
            assert isinstance(loader, DataLoader)
            assert isinstance(loader.sampler, ShardSampler)
            loader.sampler.set_epoch(2)
            whole = ShardSampler(range(60), 1, 0, shuffle=True, seed=3)
            whole.set_epoch(2)
            assert samples(loader) == list(whole)[loader.sampler.rank :: world_size]


@pytest.mark.filterwarnings("ignore:batch_size=10 does not divide")
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("batch_size", [None, 10])
def test_evaluation_without_padding_is_exact(world_size: int, batch_size: int | None) -> None:
    """Row 7: 5 samples became 6."""
    for length in (0, 1, 4, 5, 23):
        drawn = all_samples(Numbers(length), world_size, batch_size=batch_size, shuffle=False, uneven="join")
        assert drawn == list(range(length))


def test_what_cannot_be_even_is_said_once() -> None:
    """Row 7: nothing is repeated unless asked for; and nobody waits in training for a rank that has ended, unwarned."""
    with pytest.warns(UserWarning, match=r"5 on 2 ranks.* 3 steps .* 2, .*'join'.*'pad'.*'drop'") as caught:
        assert all_samples(Numbers(5), 2) == [0, 1, 2, 3, 4]
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="3 on 4 ranks"), at(0, 4):
        auto_dataloader(Numbers(3), sampler=SequentialSampler(range(3)), batch_size=8)


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({"uneven": "pad"}, [3, 3]),
        ({"uneven": "drop"}, [2, 2]),
        ({"drop_last": True}, [2, 2]),
        ({"uneven": "join"}, [3, 2]),
        ({"uneven": "pad", "sampler": RandomSampler(range(5))}, [3, 3]),
        ({"batch_size": 4}, [2, 2]),
        ({"batch_size": 4, "sampler": RandomSampler(range(5))}, [2, 2]),
    ],
)
def test_uneven_is_quiet_where_it_was_accepted_or_is_even(options: dict[str, Any], lengths: list[int]) -> None:
    assert [len(loader) for loader in loaders(Numbers(5), 2, **options)] == lengths


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_have_equally_many_batches_and_each_sample_once(world_size: int) -> None:
    for length, iterable, uneven in itertools.product((7, 16, 17, 18, 19, 23), (False, True), (None, "drop", "pad")):
        options: dict[str, Any] = {"batch_size": 2 * world_size, "shard": True, "uneven": uneven}
        made = loaders(SizedStream(length) if iterable else Numbers(length), world_size, **options)
        drawn = [[torch.as_tensor(batch).tolist() for batch in loader] for loader in made]
        assert [len(batches) for batches in drawn] == [len(loader) for loader in made] == [len(drawn[0])] * world_size
        seen = [i for batches in drawn for batch in batches for i in batch]
        if uneven is None:
            assert sorted(seen) == list(range(length))
        else:
            assert len(seen) == {"drop": length // world_size, "pad": -(-length // world_size)}[uneven] * world_size
            assert len(set(seen)) == min(length, len(seen))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_drop_last_reaches_the_sampler(world_size: int) -> None:
    """Row 7: all ranks have equally many full batches, and nothing twice."""
    made = loaders(Numbers(47), world_size, batch_size=4 * world_size, drop_last=True, shuffle=True)
    drawn = [samples(loader) for loader in made]
    assert {len(items) for items in drawn} == {47 // world_size // 4 * 4}
    assert len({i for items in drawn for i in items}) == sum(map(len, drawn))
    with at(0, world_size):
        sampler = auto_dataloader(Numbers(47), sampler=RandomSampler(range(47)), drop_last=True).sampler
    assert len(sampler) == 47 // world_size  # type: ignore[arg-type]


def test_no_global_random_state_is_touched_by_making_loaders() -> None:
    """Row 5."""
    torch.manual_seed(99)
    before = torch.get_rng_state()
    loaders(Numbers(12), 2, shuffle=True)
    with at(0, 2):
        assert len(list(auto_dataloader(Numbers(12), shuffle=True).sampler)) == 6
    assert torch.equal(torch.get_rng_state(), before)


# Samplers of the user


def test_a_sampler_is_shared_out() -> None:
    def fn() -> list[int]:
        sampler = WeightedRandomSampler([1.0, 2.0, 3.0, 4.0], 10)
        loader = auto_dataloader(Numbers(4), sampler=sampler, batch_size=4)
        assert isinstance(loader.sampler, DistributedProxySampler)
        loader.sampler.set_epoch(5)
        return samples(loader)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        wanted = list(WeightedRandomSampler([1.0, 2.0, 3.0, 4.0], 10))
    for world_size in (1, 2):
        results = run_threads(fn, world_size)
        assert results == [wanted[rank::world_size] for rank in range(world_size)]


def test_a_rank_that_is_a_thread_does_not_draw_where_rank_0_draws_the_order() -> None:
    before = torch.get_rng_state()
    run_threads(lambda: samples(auto_dataloader(Numbers(8), shuffle=True)), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_makes_the_order_on_rank_0() -> None:
    """Row 6: also one that is seeded by rank."""

    def fn() -> list[int]:
        rank = runtime.current().rank
        return samples(auto_dataloader(Numbers(8), shuffle=True, generator=torch.Generator().manual_seed(rank)))

    first, second = run_threads(fn, 2)
    order = samples(DataLoader(Numbers(8), shuffle=True, generator=torch.Generator().manual_seed(0)))
    assert (first, second) == (order[::2], order[1::2])


def seeded_by_rank() -> list[list[int]]:
    sampler = RandomSampler(range(40), generator=torch.Generator().manual_seed(runtime.current().rank))
    loader = auto_dataloader(Numbers(40), sampler=sampler, batch_size=8, num_workers=2)
    return [samples(loader) for _ in range(2)]


def test_ranks_that_are_processes_agree_on_the_order() -> None:
    """Row 6, with workers, in two epochs."""
    first, second = run_processes(seeded_by_rank, 2, backend="gloo")
    for epoch in range(2):
        assert sorted(first[epoch] + second[epoch]) == list(range(40))
    assert first[0] != first[1]


def test_a_distributed_sampler_is_used_as_it_is() -> None:
    with at(1, 2):
        sampler: DistributedSampler[Any] = DistributedSampler(Numbers(6), 2, 1)
        assert auto_dataloader(Numbers(6), sampler=sampler).sampler is sampler
        with pytest.warns(UserWarning, match="for rank 0 of 3, this process is rank 1 of 2") as caught:
            auto_dataloader(Numbers(6), sampler=DistributedSampler(Numbers(6), 3, 0))
        assert caught[0].filename == __file__
        with pytest.raises(ConfigError, match="uneven and seed do not reach a DistributedSampler"):
            auto_dataloader(Numbers(6), sampler=sampler, uneven="pad")


def test_shard_false_leaves_everything_as_it_is() -> None:
    stream, sampler = Stream(5), SequentialSampler(range(5))
    with at(1, 2):
        assert auto_dataloader(Numbers(5), sampler=sampler, shard=False).sampler is sampler
        assert samples(auto_dataloader(Numbers(5), shard=False)) == [0, 1, 2, 3, 4]
        assert auto_dataloader(stream, shard=False).dataset is stream
        with pytest.raises(ConfigError, match="seed=3"):
            auto_dataloader(Numbers(5), shuffle=True, shard=False, seed=3)


def test_a_batch_sampler_says_whether_it_is_to_be_shared_out() -> None:
    """Row 8: nobody trains on the same batches on every rank without knowing."""
    batches = BatchSampler(SequentialSampler(range(12)), 3, drop_last=False)
    with at(0, 2), pytest.raises(ConfigError, match=r"shard=True .* shard=False"):
        auto_dataloader(Numbers(12), batch_sampler=batches)
    with at(0, 2):
        assert auto_dataloader(Numbers(12), batch_sampler=batches, shard=False).batch_sampler is batches
        aware = BatchSampler(DistributedSampler(Numbers(12), 2, 0), 3, drop_last=False)
        assert auto_dataloader(Numbers(12), batch_sampler=aware).batch_sampler is aware
    with at(0, 1):
        assert auto_dataloader(Numbers(12), batch_sampler=batches).batch_sampler is batches

    def fn() -> list[list[int]]:
        loader = auto_dataloader(Numbers(12), batch_sampler=batches, shard=True)
        loader.batch_sampler.set_epoch(1)  # type: ignore[union-attr]
        return [batch.tolist() for batch in loader]

    assert run_threads(fn, 2) == [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]


# Iterable datasets


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_an_iterable_is_shared_out(world_size: int) -> None:
    """Row 8: every rank had all of it."""
    for length in range(24):
        exact = [samples(each) for each in loaders(Stream(length), world_size, shard=True)]
        assert exact == [list(range(rank, length, world_size)) for rank in range(world_size)]
        padded = [samples(each) for each in loaders(Stream(length), world_size, shard=True, uneven="pad")]
        assert {len(items) for items in padded} == {-(-length // world_size)}
        assert {i for items in padded for i in items} == set(range(length))
        dropped = [samples(each) for each in loaders(Stream(length), world_size, shard=True, drop_last=True)]
        assert dropped == [items[: length // world_size] for items in exact]


@pytest.mark.parametrize("kind", [Stream, SplitStream])
@pytest.mark.parametrize("uneven", [None, "pad"])
def test_workers_of_a_rank_share_it_out_too(kind: type[Stream], uneven: str | None) -> None:
    """Row 8: without duplicates, and in the very batches of a loader without workers."""
    for rank, length, batch_size in itertools.product((0, 1), (3, 22), (None, 6)):
        with at(rank, 2, nproc=1):
            alone = auto_dataloader(kind(length), batch_size=batch_size, shard=True, uneven=uneven)
            with_workers = auto_dataloader(
                kind(length), batch_size=batch_size, shard=True, uneven=uneven, num_workers=2
            )
        assert with_workers.num_workers == 2
        expected = [torch.as_tensor(batch).tolist() for batch in alone]
        assert [torch.as_tensor(batch).tolist() for batch in with_workers] == expected


def test_workers_of_one_process_do_not_repeat_a_stream() -> None:
    """Row 8, on one rank: plain torch gives every sample once per worker."""
    assert samples(auto_dataloader(Stream(7), batch_size=2, num_workers=2)) == list(range(7))


def test_sharding_an_iterable_speaks_unless_accepted() -> None:
    with pytest.warns(UserWarning, match=r"one item in 2.*shard=False") as caught:
        loaders(Stream(4), 2)
    assert len(caught) == 1


def test_a_sharded_iterable_still_is_the_dataset() -> None:
    first, second = loaders(SizedStream(5), 2, shard=True, batch_size=4)
    assert (len(first.dataset), len(second.dataset)) == (3, 2)  # type: ignore[arg-type]
    assert (len(first), len(second)) == (2, 2)
    assert len(list(first)) == 2
    dataset: Any = first.dataset
    assert isinstance(dataset, ShardedIterable)
    assert isinstance(dataset.dataset, SizedStream)
    dataset.set_epoch(4)
    assert dataset.epoch == dataset.dataset.epoch == 4
    assert not hasattr(dataset, "nothing_of_this_name")
    with pytest.raises(TypeError, match="len"):
        len(loaders(Stream(5), 1)[0])


def test_a_sharded_iterable_reaches_spawned_workers() -> None:
    shard = ShardedIterable(Stream(7), num_replicas=2, rank=1, pad=False)
    assert list(pickle.loads(pickle.dumps(shard))) == list(copy.copy(shard)) == [1, 3, 5]


@pytest.mark.parametrize(("pad", "drop_last"), [(True, False), (False, False), (False, True)])
def test_length_of_a_sharded_iterable(pad: bool, drop_last: bool) -> None:
    for world_size, length in itertools.product(WORLD_SIZES, range(12)):
        for rank in range(world_size):
            shard = ShardedIterable(
                SizedStream(length), num_replicas=world_size, rank=rank, pad=pad, drop_last=drop_last
            )
            assert len(list(shard)) == len(shard)


def test_a_datapipe_is_left_to_torch() -> None:
    class Pipe(IterDataPipe[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(4))

    assert not isinstance(loaders(Pipe(), 2)[0].dataset, ShardedIterable)
    assert all_samples(Pipe(), 2, shard=True) == [0, 1, 2, 3]


def test_an_endless_stream_is_read_as_it_comes() -> None:
    class Endless(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return itertools.count()

    for rank, loader in enumerate(loaders(Endless(), 3, shard=True, batch_size=6)):
        assert [batch.tolist() for batch in itertools.islice(loader, 2)] == [[rank, rank + 3], [rank + 6, rank + 9]]


# The rest


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        ({"batchsize": 4}, UnknownArgument, "'batchsize'. Did you mean 'batch_size'"),
        ({"unevn": "pad"}, TypeError, "Did you mean 'uneven'"),
        ({"batch_size_per_rank": 0}, ConfigError, "batch_size_per_rank .* at least 1, got 0"),
        ({"batch_size_per_rank": 2, "batch_size": 4}, ConfigError, "batch_size=4 and batch_size_per_rank=2"),
        ({"batch_size": 0}, ConfigError, "batch_size .* at least 1, got 0"),
        ({"batch_size": "4"}, ConfigError, "batch_size"),
        ({"batch_size": True}, ConfigError, "batch_size"),
        ({"num_workers": -1}, ConfigError, "num_workers"),
        ({"num_workers": 1.5}, ConfigError, "num_workers"),
        ({"uneven": "no"}, ConfigError, "uneven must be one of 'pad', 'drop', 'join' or None, got 'no'"),
        ({"shard": 1}, ConfigError, "shard must be"),
        ({"seed": 0.5}, ConfigError, "seed"),
        ({"sampler": SequentialSampler(range(4)), "shuffle": True}, ConfigError, "exclude"),
        ({"sampler": iter([1, 2])}, TypeError, "length"),
        ({"batch_sampler": [[1, 2]], "batch_size": 2, "shard": False}, ValueError, "batch_sampler"),
        ({"dataset": iter([1])}, TypeError, "needs a dataset"),
        ({"dataset": 5}, TypeError, "needs a dataset"),
        ({"dataset": {1}}, TypeError, "needs a dataset"),
    ],
    ids=lambda value: re.sub(" at 0x[0-9a-f]+", "", str(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_wrong_arguments_are_the_same_error_everywhere(
    world_size: int, arguments: dict[str, Any], kind: type[Exception], says: str
) -> None:
    options = dict(arguments)
    dataset = options.pop("dataset", Numbers(4))
    with at(0, world_size), pytest.raises(kind, match=says):
        auto_dataloader(dataset, **options)


def test_pin_memory_follows_the_device() -> None:
    class OnCuda(Serial):
        def device(self) -> torch.device:
            return torch.device("cuda", 0)

    with at(0, 1):
        assert not auto_dataloader(Numbers(4)).pin_memory
    with at(0, 1, backend=OnCuda()):
        assert auto_dataloader(Numbers(4)).pin_memory
        assert not auto_dataloader(Numbers(4), pin_memory=False).pin_memory


def test_the_backend_feeds_the_device() -> None:
    """It may read ahead, and gives back what it got: the loader's position is that of the batch in use."""

    class Wrapping(Serial):
        def wrap_loader(self, loader: Any) -> Any:
            assert len(loader) == 3
            return ReadingAhead(loader)

    class ReadingAhead:
        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def __iter__(self) -> Iterator[Any]:
            return iter([(batch * 10, position) for batch, position in self.loader])

    with at(0, 1, backend=Wrapping()):
        loader = auto_dataloader(Numbers(5), batch_size=2)
        seen = [(batch.tolist(), loader.state_dict()["position"]) for batch in loader]
    assert seen == [([0, 10], 2), ([20, 30], 4), ([40], 5)]


def test_prefetch_to_device_gives_batches_on_the_device() -> None:
    """Here a device that needs no hardware; tests/gpu has the copies ahead."""

    class OnMeta(Serial):
        def device(self) -> torch.device:
            return torch.device("meta")

    data = [{"x": torch.ones(2), "name": "a"} for _ in range(5)]
    with at(0, 1, backend=OnMeta()):
        plain, fed = auto_dataloader(data, batch_size=2), auto_dataloader(data, batch_size=2, prefetch_to_device=True)
        assert len(plain) == len(fed) == 3
        assert {batch["x"].device.type for batch in plain} == {"cpu"}
        batches = list(fed)
    assert [(batch["x"].device.type, tuple(batch["x"].shape)) for batch in batches] == [
        ("meta", (2, 2)),
        ("meta", (2, 2)),
        ("meta", (1, 2)),
    ]
    assert batches[2]["name"] == ["a"]


def test_other_options_reach_the_loader() -> None:
    def collate(batch: list[Any]) -> list[Any]:
        return batch

    data = TensorDataset(torch.arange(4))
    with at(0, 2):
        assert auto_dataloader(data, collate_fn=collate).collate_fn is collate
        assert list(auto_dataloader(data, batch_size=4, collate_fn=collate)) == [
            [(torch.tensor(0),), (torch.tensor(2),)]
        ]


def test_batch_size_per_rank() -> None:
    for loader in loaders(Numbers(120), 3, batch_size_per_rank=4):
        assert loader.batch_size == 4


def test_one_line_says_what_a_rank_gets(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="idist"):
        made = loaders(Numbers(60), 2, batch_size=8, shuffle=True)
        loaders(Stream(60), 1)
    first, second, third = (record.getMessage() for record in caplog.records)
    assert "rank 0 of 2 takes batch_size 4 of 8" in first
    assert "8 batches, order by ShardSampler" in first
    assert "uneven: each once" in first
    assert "rank 1 of 2" in second
    assert "batches" not in third
    assert [first, second] == [repr(loader) for loader in made]
