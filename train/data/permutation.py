"""Shuffled order without a table: the place of every number is computed, so a position is all there is to remember.

A Feistel network permutes the numbers of the smallest even number of bits that holds them; numbers that fall outside
are permuted again until they fall inside (cycle walking).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_ROUNDS = 8
_BLOCK = 1024  # numbers computed at once

UInt64Array = NDArray[np.uint64]


def mix(*values: int) -> int:
    """A 64-bit hash of some integers: splitmix64's finalizer, chained."""
    state = 0
    for value in values:
        state = (state ^ (value & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def uniform(*values: int) -> float:
    """A number in [0, 1) that depends on some integers alone."""
    return (mix(*values) >> 11) * 2.0**-53


def shuffled(position: int, size: int, key: int) -> int:
    """Which of ``size`` numbers stands at ``position`` of their order number ``key``.

    Args:
        position: 0 to ``size`` - 1.
        size: at least 1.
        key: names one of 2^64 orders.
    """
    return _block(position // _BLOCK, size, key)[position % _BLOCK]


@lru_cache(maxsize=256)
def _block(block: int, size: int, key: int) -> list[int]:
    start = block * _BLOCK
    numbers = np.arange(start, min(size, start + _BLOCK), dtype=np.uint64)
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    outside = np.ones(len(numbers), np.bool_)
    while outside.any():
        numbers[outside] = _permuted(numbers[outside], half, key)
        outside = numbers >= size
    order: list[int] = numbers.tolist()
    return order


def _permuted(numbers: UInt64Array, half: int, key: int) -> UInt64Array:
    """A permutation of the numbers of ``2 * half`` bits."""
    shift, low = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = numbers >> shift, numbers & low
    for turn in range(_ROUNDS):
        left, right = right, left ^ (_hashed(right ^ np.uint64(mix(key, turn))) & low)
    joined: UInt64Array = left << shift | right
    return joined


def _hashed(values: UInt64Array) -> UInt64Array:
    """`mix` of single numbers, without its constant; products are modulo 2^64."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    hashed: UInt64Array = values ^ values >> np.uint64(31)
    return hashed
