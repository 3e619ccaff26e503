"""The samplers: each item once over the ranks, in an order that (seed, epoch) alone decides."""

import itertools
import random
import resource
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from idist import runtime
from idist.auto import samplers
from idist.auto.samplers import DistributedProxySampler, ShardSampler, batches
from idist.errors import ConfigError, PeerFailed
from idist.testing import run_threads
from idist.topology import Topology

WORLD_SIZES = range(1, 6)
LENGTHS = range(24)


def shares(kind: Any, source: Any, world_size: int, *, epoch: int = 0, **options: Any) -> list[list[Any]]:
    """What each rank draws, the ranks being samplers in one process."""
    samplers = [kind(source, world_size, rank, **options) for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    drawn = [list(sampler) for sampler in samplers]
    assert [len(items) for items in drawn] == [len(sampler) for sampler in samplers]
    assert [len(items) for items in drawn] == [sampler.num_samples for sampler in samplers]
    return drawn


def joined(drawn: list[list[Any]]) -> list[Any]:
    """The one order that the ranks have shared out."""
    longest = max(map(len, drawn))
    return [items[i] for i in range(longest) for items in drawn if i < len(items)]


class Flipping(Sampler[int]):
    """Draws from torch's global generator, and keeps a state."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.passes = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        yield from torch.randperm(self.length).tolist()


class Failing(Sampler[int]):
    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[int]:
        yield int(torch.randint(4, ()))
        raise OSError("the index file is gone")


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_each_index_exactly_once(world_size: int, shuffle: bool) -> None:
    """Row 7: evaluation without padding is exact, and the ranks have one index more or less at most."""
    for length in LENGTHS:
        drawn = shares(ShardSampler, range(length), world_size, shuffle=shuffle)
        assert sorted(joined(drawn)) == list(range(length))
        assert max(map(len, drawn)) - min(map(len, drawn)) <= 1


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_equally_many_with_padding_and_with_drop_last(world_size: int, shuffle: bool) -> None:
    """Row 7: padding repeats what the order began with, drop_last leaves out what it ends with."""
    for length in LENGTHS:
        exact = joined(shares(ShardSampler, range(length), world_size, shuffle=shuffle))
        padded = shares(ShardSampler, range(length), world_size, shuffle=shuffle, pad=True)
        dropped = shares(ShardSampler, range(length), world_size, shuffle=shuffle, drop_last=True)
        assert {len(items) for items in padded} == {-(-length // world_size)}
        assert {len(items) for items in dropped} == {length // world_size}
        missing = -length % world_size
        assert joined(padded) == exact + (exact * world_size)[:missing]
        assert joined(dropped) == exact[: length - length % world_size]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_in_sequence_it_shares_as_torch_does(world_size: int, drop_last: bool) -> None:
    for length in range(1, 24):
        theirs = shares(DistributedSampler, range(length), world_size, shuffle=False, drop_last=drop_last)
        ours = shares(ShardSampler, range(length), world_size, drop_last=drop_last, pad=not drop_last)
        assert ours == theirs


def test_the_order_is_the_same_on_every_number_of_ranks() -> None:
    orders = [joined(shares(ShardSampler, range(23), n, shuffle=True, seed=7)) for n in WORLD_SIZES]
    assert orders == [orders[0]] * len(orders)


def test_the_default_device_does_not_matter() -> None:
    with torch.device("meta"):
        drawn = shares(ShardSampler, range(7), 2, shuffle=True)
    assert drawn == shares(ShardSampler, range(7), 2, shuffle=True)


@pytest.mark.parametrize("kind", [ShardSampler, DistributedProxySampler])
def test_the_order_depends_on_seed_and_epoch(kind: Any) -> None:
    """Row 5: user seeds 1 and 2 are two orders, in every epoch, and seed 1 is not seed 2 an epoch later."""
    source, options = (Flipping(20), {}) if kind is DistributedProxySampler else (range(20), {"shuffle": True})
    cases = [(seed, epoch) for seed in range(4) for epoch in range(4)]
    orders = {(s, e): tuple(joined(shares(kind, source, 2, epoch=e, seed=s, **options))) for s, e in cases}
    assert len(set(orders.values())) == len(cases)
    assert all(orders[s, e] == tuple(joined(shares(kind, source, 2, epoch=e, seed=s, **options))) for s, e in cases)


def samplers_of_torch() -> list[Any]:
    weights = [float(i % 5 + 1) for i in range(23)]
    return [
        RandomSampler(range(23)),
        RandomSampler(range(23), replacement=True, num_samples=40),
        WeightedRandomSampler(weights, 50),
        WeightedRandomSampler(weights, 11, replacement=False),
        SubsetRandomSampler([3, 1, 4, 15, 9, 2, 6]),
        SequentialSampler(range(23)),
        BatchSampler(RandomSampler(range(23)), 4, drop_last=False),
        Flipping(13),
    ]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("sampler", samplers_of_torch(), ids=lambda sampler: type(sampler).__name__)
def test_proxy_draws_what_the_sampler_draws_after_manual_seed(sampler: Any, world_size: int) -> None:
    """Row 5: as users know it in each epoch, and exactly that many items (with replacement too)."""
    for epoch in range(4):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(epoch)
            wanted = list(sampler)
        assert len(wanted) == len(sampler)
        assert joined(shares(DistributedProxySampler, sampler, world_size, epoch=epoch)) == wanted
        padded = joined(shares(DistributedProxySampler, sampler, world_size, epoch=epoch, pad=True))
        assert padded == wanted + wanted[: len(padded) - len(wanted)]
        assert len(padded) - len(wanted) == -len(wanted) % world_size


def global_state() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate()


@pytest.mark.parametrize("sampler", [Flipping(9), ShardSampler(range(9), 1, 0), WeightedRandomSampler([1.0] * 9, 9)])
def test_global_random_state_is_as_it_was(sampler: Any) -> None:
    """Row 5: neither making a sampler, nor a pass, nor setting an epoch touches it."""
    torch.manual_seed(1234)
    before = global_state()
    ours = sampler if isinstance(sampler, ShardSampler) else DistributedProxySampler(sampler, 2, 1, seed=5)
    ours.set_epoch(2)
    assert len(list(ours)) > 0
    assert global_state() == before


def test_global_random_state_is_as_it_was_if_the_sampler_raises() -> None:
    """Row 5."""
    torch.manual_seed(1234)
    before = global_state()
    with pytest.raises(OSError, match="index file"):
        list(DistributedProxySampler(Failing(), 2, 1))
    assert global_state() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_global_random_state_of_cuda_is_as_it_was() -> None:
    """Row 5, where a sampler draws on the device."""

    class OnCuda(Flipping):
        def __iter__(self) -> Iterator[int]:
            yield from torch.randperm(self.length, device="cuda").tolist()

    torch.cuda.manual_seed(77)
    before = torch.cuda.get_rng_state()
    drawn = list(DistributedProxySampler(OnCuda(50), 1, 0))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert drawn == list(OnCuda(50))


def test_the_seed_of_the_user_does_not_matter_but_is_kept() -> None:
    torch.manual_seed(1)
    first = shares(DistributedProxySampler, Flipping(12), 3)
    torch.manual_seed(2)
    expected = torch.rand(3, generator=torch.Generator().manual_seed(2))
    assert shares(DistributedProxySampler, Flipping(12), 3) == first
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kind", [ShardSampler, DistributedProxySampler])
def test_the_epoch_advances_with_complete_passes_only(kind: Any) -> None:
    def new() -> Any:
        return kind(Flipping(12), 1, 0) if kind is DistributedProxySampler else kind(range(12), 1, 0, shuffle=True)

    by_hand, by_itself = new(), new()
    orders = []
    for epoch in range(3):
        by_hand.set_epoch(epoch)
        orders.append(list(by_hand))
        next(iter(by_itself))  # a look at the first item
        assert list(by_itself) == orders[-1]
    assert all(one != other for one, other in pairwise(orders))
    by_itself.set_epoch(1)
    assert list(by_itself) == orders[1]


@pytest.mark.parametrize("batch_size", [None, 1, 4, 5])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_pass_of_a_loader_is_a_complete_pass(batch_size: int | None, drop_last: bool) -> None:
    sampler = ShardSampler(range(12), 1, 0, shuffle=True)
    loader: DataLoader[int] = DataLoader(
        list(range(12)),  # type: ignore[arg-type]
        batch_size=batch_size,
        sampler=sampler,
        drop_last=drop_last and batch_size is not None,
    )
    for epoch in range(3):
        assert sampler.epoch == epoch
        assert len(list(loader)) == len(loader)


def test_set_epoch_reaches_a_sampler_that_has_it() -> None:
    class Own(Flipping):
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    sampler = Own(4)
    DistributedProxySampler(sampler, 2, 0).set_epoch(6)
    assert sampler.epoch == 6


def test_what_a_sampler_yields_is_shared_out_whatever_its_length_says() -> None:
    class Promising(Flipping):
        def __len__(self) -> int:
            return 10

    for length in (8, 13):
        drawn = [list(DistributedProxySampler(Promising(length), 3, rank)) for rank in range(3)]
        assert sorted(joined(drawn)) == list(range(length))


def test_length_follows_a_dataset_that_grows() -> None:
    data = list(range(4))
    sampler = ShardSampler(data, 2, 0)
    assert len(sampler) == 2
    data.extend(range(4, 10))
    assert len(sampler) == 5
    assert list(sampler) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    ("wrong", "kind", "says"),
    [
        (lambda: DistributedProxySampler(None), TypeError, "length"),  # type: ignore[arg-type]
        (lambda: DistributedProxySampler(iter([1, 2])), TypeError, "length"),
        (lambda: DistributedProxySampler(DistributedSampler(range(4), 2, 0)), TypeError, "already"),  # type: ignore[arg-type]
        (lambda: DistributedProxySampler(ShardSampler(range(4), 2, 0)), TypeError, "already"),
        (lambda: ShardSampler(range(4), 2, 2), ConfigError, "rank=2 of 2"),
        (lambda: ShardSampler(range(4), 2, -1), ConfigError, "rank=-1"),
        (lambda: ShardSampler(range(4), 0, 0), ConfigError, "rank=0 of 0"),
        (lambda: ShardSampler(range(4), 2, 0, seed="1"), ConfigError, "seed"),  # type: ignore[arg-type]
        (lambda: DistributedProxySampler([1], 2.0, 0), ConfigError, "num_replicas"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments(wrong: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        wrong()


def test_default_is_the_context() -> None:
    """Where nothing is distributed one rank draws all; a list is a sampler, too."""
    sampler = DistributedProxySampler([4, 2, 7])
    assert (sampler.num_replicas, sampler.rank) == (1, 0)
    assert list(sampler) == [4, 2, 7]


# Large, streamed, taken up again


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_billion_samples_take_no_memory(shuffle: bool) -> None:
    """A list of them would take 8 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sampler = ShardSampler(range(10**9), 8, 3, shuffle=shuffle)
    drawn = list(itertools.islice(sampler, 20_000))
    assert len(set(drawn)) == 20_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn() -> list[Any]:
        kinds: list[tuple[Any, Any, dict[str, Any]]] = [
            (ShardSampler, range(100), {"shuffle": True}),
            (ShardSampler, range(100), {}),
            (DistributedProxySampler, Flipping(100), {}),
            (DistributedProxySampler, Bit(100), {}),
        ]
        return [shares(kind, source, 3, seed=5, pad=pad, **more) for kind, source, more in kinds for pad in (0, 1)]

    at_once = drawn()
    for first, size in ((1, 1), (2, 3), (7, 100), (3, 99)):
        monkeypatch.setattr(samplers, "_FIRST_CHUNK", first)
        monkeypatch.setattr(samplers, "_CHUNK", size)
        assert drawn() == at_once


class Bit(Flipping):
    """Draws item by item: a stream of random numbers."""

    drawn = 0

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.length):
            self.drawn += 1
            yield int(torch.randint(10**9, ()))


def test_a_proxy_streams() -> None:
    """The sampler is asked for what is needed, in turns with the program's own use of torch's random numbers."""
    sampler = Bit(10**9)
    passing = iter(DistributedProxySampler(sampler, 2, 1))
    torch.manual_seed(3)
    ours, theirs = [], []
    for _ in range(10_000):
        theirs.append(next(passing))
        ours.append(float(torch.rand(())))
    assert sampler.drawn < 30_000
    torch.manual_seed(3)
    assert ours == [float(torch.rand(())) for _ in range(10_000)]
    torch.manual_seed(0)
    assert theirs == list(itertools.islice(Bit(20_000), 1, None, 2))


def test_ranks_that_read_unequally_far_ahead_are_told_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes with 2 and 1 processes: the workers of a node are divided by them."""
    monkeypatch.setattr(samplers, "_TOLD_CHUNK", 4)
    monkeypatch.setattr(samplers, "_evenly_placed", lambda topology: False)

    def fn() -> list[int]:
        passing = iter(DistributedProxySampler(Bit(20)))
        if runtime.current().rank == 1:
            return []  # begins, and asks for no more
        return list(passing)

    assert list(map(len, run_threads(fn, 3))) == [7, 0, 6]


def test_nodes_of_equally_many_processes() -> None:
    def evenly(nproc_per_node: int, nnodes: int) -> bool:
        return samplers._evenly_placed(Topology("", 0, 4, 0, nproc_per_node, 0, nnodes))

    assert evenly(2, 2)
    assert evenly(4, 1)
    assert evenly(1, 4)
    assert not evenly(3, 2)
    assert not evenly(1, 2)
    assert not samplers._evenly_placed(Topology("made by hand", 0, 4))


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 16])
def test_rank_0_tells_its_order_in_parts(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setattr(samplers, "_TOLD_CHUNK", 8)

    def fn() -> list[int]:
        return list(DistributedProxySampler(Bit(length), pad=True))

    drawn = run_threads(fn, 3)
    torch.manual_seed(0)
    wanted = list(Bit(length))
    assert joined(drawn) == wanted + (wanted * 3)[: -length % 3]


def test_a_sampler_that_raises_later_fails_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "_TOLD_CHUNK", 1)
    monkeypatch.setattr(samplers, "_HEAD", 1)

    def fn() -> str:
        passing = iter(DistributedProxySampler(Failing()))
        with pytest.raises((OSError, PeerFailed), match="the index file is gone") as caught:
            list(passing)
        return caught.type.__name__

    assert run_threads(fn, 2) == ["OSError", "PeerFailed"]


def steps(sampler: Any, size: int, *, drop_last: bool = False) -> list[tuple[list[int], int]]:
    return list(batches(sampler.rounds(), sampler.start, sampler.num_replicas, size, drop_last=drop_last))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_all_ranks_have_equally_many_batches(world_size: int, size: int) -> None:
    """And after each step all ranks have had a beginning of the order, as long as the position says."""
    for length in range(40):
        ranks = [steps(ShardSampler(range(length), world_size, rank, shuffle=True), size) for rank in range(world_size)]
        order = list(ShardSampler(range(length), 1, 0, shuffle=True))
        if size > 1 and length >= world_size:
            assert len({len(each) for each in ranks}) == 1
        assert all(0 < len(batch) <= size for each in ranks for batch, _ in each)
        had: list[int] = []
        for k in range(len(ranks[0])):
            step = [each[k] for each in ranks if k < len(each)]
            had += [item for batch, _ in step for item in batch]
            assert {after for _, after in step} == {len(had)}
            assert sorted(had) == sorted(order[: len(had)])
        assert len(had) == length


@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_that_pad_or_drop_are_equally_large(drop_last: bool) -> None:
    for world_size, size, length in itertools.product(WORLD_SIZES, (1, 2, 3), range(30)):
        options = {"drop_last": drop_last, "pad": not drop_last}
        ranks = [
            steps(ShardSampler(range(length), world_size, rank, **options), size, drop_last=drop_last)  # type: ignore[arg-type]
            for rank in range(world_size)
        ]
        shapes = [[(len(batch), after) for batch, after in each] for each in ranks]
        assert shapes == [shapes[0]] * world_size
        if drop_last:
            assert shapes[0] == [(size, (k + 1) * size * world_size) for k in range(length // (size * world_size))]


@pytest.mark.parametrize("kind", [ShardSampler, DistributedProxySampler])
@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 3), (3, 2), (4, 4), (8, 6)])
def test_the_rest_of_an_epoch_on_another_number_of_ranks(kind: Any, before: int, after: int) -> None:
    for length, size in itertools.product((5, 16, 47, 64), (1, 2, 3)):
        source, options = (Flipping(length), {}) if kind is DistributedProxySampler else (range(length), {"shuffle": 1})
        whole = kind(source, 1, 0, seed=9, **options)
        whole.set_epoch(4)
        order = list(whole)
        for _, position in steps(_in_epoch_4(kind(source, before, 0, seed=9, **options)), size):
            rest = [kind(source, after, rank, seed=9, **options) for rank in range(after)]
            for sampler in rest:
                sampler.resume(4, position)
            assert joined([list(sampler) for sampler in rest]) == order[position:]
            assert {(sampler.epoch, sampler.start) for sampler in rest} == {(5, 0)}


def _in_epoch_4(sampler: Any) -> Any:
    sampler.set_epoch(4)
    return sampler


def test_the_same_epoch_keeps_its_start_and_another_is_whole() -> None:
    sampler = ShardSampler(range(10), 1, 0)
    sampler.resume(3, 8)
    sampler.set_epoch(3)
    assert next(iter(sampler)) == 8
    assert list(sampler) == [8, 9]
    assert list(sampler) == list(range(10))
    sampler.resume(3, 8)
    sampler.set_epoch(4)
    assert list(sampler) == list(range(10))


# Ranks that talk


@pytest.mark.parametrize("world_size", [2, 4])
def test_samplers_that_disagree_give_the_order_of_rank_0(world_size: int) -> None:
    """Row 6: 8 items gave [0,1,3,4,5,5,6,7] with a generator per rank."""

    def fn() -> tuple[list[int], list[int]]:
        ours = DistributedProxySampler(range(8))  # for its rank
        generator = torch.Generator().manual_seed(100 + ours.rank)
        sampler = DistributedProxySampler(RandomSampler(range(8), generator=generator))
        return list(sampler), list(sampler)

    results = run_threads(fn, world_size)
    generator = torch.Generator().manual_seed(100)
    for drawn in zip(*results, strict=True):
        assert joined(list(drawn)) == list(RandomSampler(range(8), generator=generator))


@pytest.mark.parametrize(
    "items",
    [
        list(range(1000)),
        ["a", "é", (1, 2), None, 3.5],
        [True, False, True],
        [2**70, 1, 2, 3],
        [[0, 1], [2], [3, 4, 5]],
        [],
    ],
    ids=["integers", "mixed", "booleans", "large", "batches", "nothing"],
)
def test_items_arrive_as_they_are(items: list[Any]) -> None:
    """Row 6, for items of any type: all ranks have what rank 0's sampler has."""

    def fn() -> list[Any]:
        rank = DistributedProxySampler([]).rank
        return list(DistributedProxySampler(items if rank == 0 else list(reversed(items))))

    drawn = joined(run_threads(fn, 2))
    assert drawn == items
    assert [type(item) for item in drawn] == [type(item) for item in items]


def test_only_rank_0_iterates_the_sampler_and_the_state_is_kept() -> None:
    """Row 5, with ranks that talk."""
    torch.manual_seed(4321)
    before = torch.get_rng_state()

    def fn() -> tuple[list[int], int]:
        sampler = Flipping(10)
        return list(DistributedProxySampler(sampler, pad=True)), sampler.passes

    drawn, passes = zip(*run_threads(fn, 3), strict=True)
    assert passes == (1, 0, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(0)
    wanted = torch.randperm(10).tolist()
    assert joined(list(drawn)) == wanted + wanted[:2]


def test_a_sampler_that_raises_on_rank_0_fails_on_every_rank() -> None:
    """Nobody waits for an order that does not come; afterwards the ranks can go on."""

    def fn() -> str:
        failing = DistributedProxySampler(Failing())
        with pytest.raises(OSError if failing.rank == 0 else PeerFailed, match="the index file is gone"):
            list(failing)
        return f"{list(DistributedProxySampler(range(2)))}"

    assert run_threads(fn, 2) == ["[0]", "[1]"]


def test_numbers_that_are_not_the_context_need_no_other_rank() -> None:
    def fn() -> list[int]:
        rank = DistributedProxySampler([]).rank
        if rank == 1:
            return []
        return [i for part in range(4) for i in DistributedProxySampler(range(9), 4, part)]

    assert sorted(run_threads(fn, 2)[0]) == list(range(9))
