"""Filling rows of fixed length from a buffer of samples."""

from __future__ import annotations

from collections.abc import Sequence


def fill_row(lengths: Sequence[int], row_length: int) -> list[int]:
    """The waiting samples that fill a row best.

    The oldest one is always among them, so that none waits for ever; of the others, those that leave the least room
    empty (subset sum, exactly), older ones rather than newer.

    Args:
        lengths: of the samples in tokens, the oldest first; at least one, none longer than a row.
        row_length: tokens of a row.

    Returns:
        Their places in ``lengths``, ascending.
    """
    # Bit t of a set is on where some of the samples so far have t tokens together.
    within = (1 << (row_length - lengths[0] + 1)) - 1
    sets = [1]
    for length in lengths[1:]:
        sets.append((sets[-1] | sets[-1] << length) & within)
    tokens = sets[-1].bit_length() - 1
    chosen = []
    for place in range(len(lengths) - 1, 0, -1):
        if not sets[place - 1] >> tokens & 1:  # cannot be had without this one
            chosen.append(place)
            tokens -= lengths[place]
    return [0, *reversed(chosen)]
