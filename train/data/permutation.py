"""Shuffled order without a table: the place of every number is computed, so a position is all there is to remember.

A four-round Feistel network permutes the numbers of the smallest even number of bits that holds them; numbers that
fall outside are permuted again until they fall inside (cycle walking).
"""

from __future__ import annotations

_MASK = (1 << 64) - 1
_ROUNDS = 4


def mix(*values: int) -> int:
    """A 64-bit hash of some integers (the finalizer of splitmix64, chained)."""
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
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    number = position
    while True:
        left, right = number >> half, number & low
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (mix(key + round_, right) & low)
        number = left << half | right
        if number < size:
            return number
