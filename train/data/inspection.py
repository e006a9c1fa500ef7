"""What is in a data set: counts, lengths, samples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cpmbee.errors import DataError
from cpmbee.train.data.records import RecordSet

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
_BAR_WIDTH = 40


@dataclass(frozen=True)
class LengthBin:
    """Records whose characters lie in ``low`` to ``high``, both included."""

    low: int
    high: int
    records: int


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        records: in the data set.
        characters: of text in them.
        percentiles: lengths in characters, by percentile.
        histogram: of the lengths; bins double in width.
        samples: numbers of some records and what they hold, as JSON text.
    """

    records: int
    characters: int
    percentiles: dict[int, int]
    histogram: tuple[LengthBin, ...]
    samples: tuple[tuple[int, str], ...]


def inspect_dataset(dataset: RecordSet, samples: int = 3) -> Inspection:
    """Look into a data set.

    Args:
        dataset: the data set.
        samples: how many records to show, evenly spread.

    Raises:
        DataError: it has no records, or is damaged.
    """
    lengths = dataset.lengths()
    if not len(lengths):
        raise DataError(f"{dataset.name}: the data set is empty")
    values = np.percentile(lengths, PERCENTILES, method="nearest").astype(int).tolist()
    chosen = np.linspace(0, len(dataset) - 1, min(samples, len(dataset))).astype(int).tolist()
    return Inspection(
        records=len(lengths),
        characters=int(lengths.sum()),
        percentiles=dict(zip(PERCENTILES, values, strict=True)),
        histogram=tuple(_histogram(lengths)),
        samples=tuple((index, json.dumps(dataset.read(index), ensure_ascii=False)) for index in chosen),
    )


def _histogram(lengths: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Iterator[LengthBin]:
    """Lengths 0, 1, 2-3, 4-7, ...: from the first bin that is not empty to the last."""
    exponents = np.frexp(lengths.astype(np.float64))[1]  # length 2^(e-1) to 2^e - 1 has exponent e
    counts = np.bincount(exponents)
    for exponent in range(int(exponents.min()), len(counts)):
        low = 0 if exponent == 0 else 1 << (exponent - 1)
        yield LengthBin(low, max(0, (1 << exponent) - 1), int(counts[exponent]))


def histogram_lines(histogram: tuple[LengthBin, ...]) -> list[str]:
    """The histogram as bars of text."""
    most = max(part.records for part in histogram)
    labels = [f"{part.low}-{part.high}" if part.low != part.high else str(part.low) for part in histogram]
    width = max(map(len, labels))
    return [
        f"{label:>{width}} {part.records:>12,} {'#' * -(-part.records * _BAR_WIDTH // most)}".rstrip()
        for label, part in zip(labels, histogram, strict=True)
    ]
