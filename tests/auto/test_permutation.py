"""The keyed permutation: exhaustively for small lengths, by statistics with fixed keys, at once at 1e9."""

import math
from collections import Counter

import pytest
import torch

from idist.auto.permutation import Permutation

FIRST_TEN = [4, 2, 0, 8, 5, 3, 1, 9, 7, 6]
FIRST_OF_1E9 = [196137975, 374482003, 488379130]


def whole(length: int, key: str) -> list[int]:
    return Permutation(length, key).at(torch.arange(length)).tolist()


def deviation(counts: list[int], expected: float) -> float:
    """Chi-square of a uniform distribution, in standard deviations from its mean: within 4, or something is wrong."""
    freedom = len(counts) - 1
    return (sum((count - expected) ** 2 for count in counts) / expected - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("key", ["0 0", "7 3"])
def test_every_small_length_is_permuted(key: str) -> None:
    for length in range(600):
        assert sorted(whole(length, key)) == list(range(length))


@pytest.mark.parametrize("length", [4095, 4096, 4097, 65_535, 65_536, 99_991, 1_000_000])
def test_larger_lengths_are_permuted(length: int) -> None:
    assert torch.equal(Permutation(length, "key").at(torch.arange(length)).sort().values, torch.arange(length))


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_every_order_is_equally_likely(length: int) -> None:
    orders, draws = math.factorial(length), 25
    seen = Counter(tuple(whole(length, f"{key}")) for key in range(orders * draws))
    assert len(seen) == orders
    assert abs(deviation(list(seen.values()), draws)) < 4


@pytest.mark.parametrize("length", [7, 13])
def test_two_neighbours_are_any_two(length: int) -> None:
    """Over many keys, what stands at places 0 and 1 is each ordered pair equally often; so at the last two."""
    pairs, draws = length * (length - 1), 20
    for places in (torch.tensor([0, 1]), torch.tensor([length - 2, length - 1])):
        seen = Counter(tuple(Permutation(length, f"{key}").at(places).tolist()) for key in range(pairs * draws))
        assert abs(deviation([*seen.values(), *[0] * (pairs - len(seen))], draws)) < 4


@pytest.mark.parametrize(("length", "places"), [(60_000, 60_000), (10**6, 10**6), (10**9, 10**6)])
def test_in_one_order_nothing_stays_together(length: int, places: int) -> None:
    """Where items go, by 50 x 50 cells of (from, to); how far neighbours lie apart; what neighbours are, by cells."""
    grid = 50
    start = torch.arange(places) * (length // places)
    end = Permutation(length, "one key").at(start)
    cells = (start * grid // length) * grid + end * grid // length
    assert abs(deviation(torch.bincount(cells, minlength=grid**2).tolist(), places / grid**2)) < 4
    steps = (end[1:] - end[:-1]) % length * grid // length
    assert abs(deviation(torch.bincount(steps, minlength=grid).tolist(), (places - 1) / grid)) < 4
    neighbours = (end[:-1] * grid // length) * grid + end[1:] * grid // length
    assert abs(deviation(torch.bincount(neighbours, minlength=grid**2).tolist(), (places - 1) / grid**2)) < 4
    parity = torch.bincount((torch.arange(places) % 2) * 2 + end % 2, minlength=4)
    assert abs(deviation(parity.tolist(), places / 4)) < 4


def test_two_keys_have_no_more_in_common_than_chance() -> None:
    """Fixed points of one against the other are Poisson distributed, with mean 1."""
    orders = [torch.tensor(whole(1000, f"{seed} {epoch}")) for seed in range(8) for epoch in range(8)]
    common = [int((one == other).sum()) for i, one in enumerate(orders) for other in orders[:i]]
    assert abs(sum(common) - len(common)) < 4 * math.sqrt(len(common))
    assert max(common) < 10


def test_the_order_never_changes() -> None:
    """Not with torch, not with the machine: a run that is resumed elsewhere goes on as it began."""
    assert whole(10, "0 0") == FIRST_TEN
    assert Permutation(10**9, "0 0").at(torch.arange(3)).tolist() == FIRST_OF_1E9


def test_integers_stay_integers() -> None:
    """At lengths where a double has no room for the last digits: inverses of different places differ."""
    length = 2**62 - 1
    places = torch.cat([torch.arange(5000), length - 1 - torch.arange(5000)])
    found = Permutation(length, "key").at(places)
    assert len(set(found.tolist())) == len(places)
    assert (found >= 0).all()
    assert (found < length).all()


@pytest.mark.parametrize("length", [-1, 2**62])
def test_wrong_lengths(length: int) -> None:
    with pytest.raises(ValueError, match=f"got {length}"):
        Permutation(length, "key")
