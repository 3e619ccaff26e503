"""A random order that is computed place by place: no list, whatever the length."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

__all__ = ["Permutation"]

_ROUNDS, _ROUNDS_IF_SMALL, _SMALL = 8, 24, 1 << 16
"""From four rounds on a Feistel network is a strong pseudorandom permutation; a small grid mixes more slowly."""


class Permutation:
    """A pseudorandom permutation of ``range(length)``, chosen by ``key``: the same on every machine and torch.

    A place is written as a pair of digits (x, y) in a grid of a times b, just large enough. Each round adds to one
    digit a keyed hash of the other, which can be undone and so is a bijection of the grid: the generalized Feistel
    cipher of Black and Rogaway. What falls outside ``range(length)`` goes through the cipher again until it does not
    (their cycle-walking cipher); less than one place in ``sqrt(length)`` does. All is integer arithmetic.

    This shuffles; it does not hide: the round function is a fast hash, not a cryptographic one.

    Args:
        length: below 2**62.
        key: any text; two keys give two unrelated orders.

    Cost: O(1) time and memory for each place that is asked for, and to make one.

    Source: J. Black, P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002 (methods 2 and 3). The hash is
    the finalizer of SplitMix64: G. Steele, D. Lea, C. Flood, "Fast Splittable Pseudorandom Number Generators",
    OOPSLA 2014. M. Luby, C. Rackoff, "How to Construct Pseudorandom Permutations from Pseudorandom Functions", 1988.
    """

    def __init__(self, length: int, key: str) -> None:
        if not 0 <= length < 1 << 62:
            raise ValueError(f"length must be at least 0 and below 2**62, got {length}")
        self.length = length
        # With two odd sides every round would be an even permutation, and half of all orders could never come.
        root = math.isqrt(max(0, length - 1)) + 1  # rounded up
        a = root + root % 2
        self._sides = (a, -(-length // a))
        digest = hashlib.shake_256(key.encode()).digest(8 * (_ROUNDS_IF_SMALL if length < _SMALL else _ROUNDS))
        self._keys = [int.from_bytes(digest[i : i + 8], "big", signed=True) for i in range(0, len(digest), 8)]

    def __len__(self) -> int:
        return self.length

    def at(self, places: Tensor) -> Tensor:
        """What stands at these places, which are integers (int64) of ``range(length)``.

        Shape: that of ``places``.
        """
        found = self._encipher(places)
        outside = (found >= self.length).nonzero(as_tuple=True)
        while len(outside[0]):
            walked = self._encipher(found[outside])
            found[outside] = walked
            still = walked >= self.length
            outside = tuple(index[still] for index in outside)
        return found

    def _encipher(self, places: Tensor) -> Tensor:
        a, b = self._sides
        y = torch.div(places, a, rounding_mode="floor")
        x = places - y * a
        for number, key in enumerate(self._keys):
            if number % 2 == 0:
                x = _add(x, _hash(y, key), a)
            else:
                y = _add(y, _hash(x, key), b)
        return y.mul_(a).add_(x)


def _add(digit: Tensor, hashed: Tensor, side: int) -> Tensor:
    """``digit`` plus a number below ``side`` that the 31 bits of the hash choose, modulo ``side``."""
    total = hashed.mul_(side).bitwise_right_shift_(31).add_(digit)
    return total.sub_((total >= side).to(torch.int64).mul_(side))


def _hash(digit: Tensor, key: int) -> Tensor:
    """31 bits. Products wrap around at 64 bits; shifts are of unsigned numbers, which torch's int64 is not."""
    z = digit ^ key
    z = (z ^ _shifted(z, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    z = (z ^ _shifted(z, 27)).mul_(_signed(0x94D049BB133111EB))
    return _shifted(z, 33)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
