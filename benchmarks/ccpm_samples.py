"""What is trained on: generated look-ups first, which teach where to look, then the records themselves.

A look-up is made from lines alone: its text holds some characters of one of four lines, among characters of modern
text, and the line is the answer. Characters that many texts have are there by chance, so that a rare one counts more.

As long as there are look-ups, ends of answers do not count. What names a key must not be named again behind it; learnt
first, that undoes the naming before it has been of any use, and the model stays at chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmbee.bench.ccpm_data import MASK, OPTIONS, CcpmRecord, request
from cpmbee.model import IGNORE_INDEX
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.batches import TrainingBatch, TrainingSample, encode_sample
from cpmbee.train.drawn_batches import BATCHES_PER_DRAW, DrawnBatches

PUNCTUATION = "，。？！：；、"
LEAST_KEPT = 0.3  # share of a line's characters that a look-up's text has, at least
NOISE = (2, 14)  # characters of modern text in it, from and below
UNRELATED = 0.5  # share of look-ups whose lines are unrelated; the others have the lines of one record


def lookup(records: Sequence[CcpmRecord], rng: np.random.Generator) -> CcpmRecord:
    """A generated record; which line its model was translated to plays no part."""
    chosen = [records[int(index)] for index in rng.integers(len(records), size=OPTIONS + 1)]
    lines = list(chosen[0].lines)
    if rng.random() < UNRELATED:
        lines = [record.lines[int(rng.integers(OPTIONS))] for record in chosen[:OPTIONS]]
    right = int(rng.integers(OPTIONS))
    kept_share = rng.uniform(LEAST_KEPT, 1)
    kept = [char for char in lines[right] if char not in PUNCTUATION and rng.random() < kept_share]
    if rng.random() < 0.5:
        rng.shuffle(kept)
    noise = _piece(chosen[-1].text, int(rng.integers(*NOISE)), rng)
    return CcpmRecord(_interleaved(kept, noise, rng) or PUNCTUATION[0], tuple(lines), right)


def varied(record: CcpmRecord, masked: float, rng: np.random.Generator) -> dict[str, Any]:
    """The request of a record with its options in another order and a share of all characters masked."""
    order = rng.permutation(OPTIONS)

    def markup(text: str) -> str:
        hidden = rng.random(len(text)) < masked
        return "".join(MASK if hide else Tokenizer.escape(char) for char, hide in zip(text, hidden, strict=True))

    right = int(np.flatnonzero(order == record.right)[0])
    return request(markup(record.text), [markup(record.lines[index]) for index in order], right)


def _piece(text: str, length: int, rng: np.random.Generator) -> list[str]:
    start = int(rng.integers(0, max(1, len(text) - length)))
    return list(text[start : start + length])


def _interleaved(first: list[str], second: list[str], rng: np.random.Generator) -> str:
    """Both sequences, each in its order."""
    from_first = np.zeros(len(first) + len(second), np.bool_)
    from_first[rng.permutation(len(from_first))[: len(first)]] = True
    one, other = iter(first), iter(second)
    return "".join(next(one) if take else next(other) for take in from_first)


class CcpmBatches(DrawnBatches):
    """Look-ups and records; the share of look-ups falls linearly from all to none over the first batches.

    Records come once an epoch, shuffled.

    Args:
        records: to train on.
        tokenizer: their vocabulary.
        batch_size: rows.
        lookup_batches: until there are no look-ups any more.
        masked: share of the records' characters that are masked; look-ups have noise enough.
        seed: of everything that is drawn.
        rank: of this process.
        world_size: processes that share the rows of a batch.
    """

    tasks = ("look-up", "ccpm")

    def __init__(
        self,
        records: Sequence[CcpmRecord],
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        lookup_batches: int,
        masked: float,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(tokenizer, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        self._records = records
        self._lookup_batches = lookup_batches
        self._masked = masked
        self._order: tuple[int, NDArray[np.int64]] | None = None  # of the records in an epoch

    def _samples(self, number: int, count: int, rng: np.random.Generator) -> Iterator[TrainingSample]:
        share = self._lookup_share(number)
        for index in range(number * count, (number + 1) * count):
            task = int(rng.random() >= share)
            data = varied(self._record(index), self._masked, rng) if task else lookup(self._records, rng).request()
            yield encode_sample(data, self._tokenizer, task=task)

    def _draw(self, number: int, first: int) -> Iterator[TrainingBatch]:
        for batch in super()._draw(number, first):
            yield self._without_ends(batch) if self._lookup_share(number) else batch

    def _lookup_share(self, number: int) -> float:
        """Of the samples of a draw."""
        return max(0.0, 1 - number * BATCHES_PER_DRAW / self._lookup_batches) if self._lookup_batches else 0.0

    def _without_ends(self, batch: TrainingBatch) -> TrainingBatch:
        return replace(batch, targets=np.where(batch.targets == self._tokenizer.eos_id, IGNORE_INDEX, batch.targets))

    def _record(self, index: int) -> CcpmRecord:
        epoch, place = divmod(index, len(self._records))
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng((self._seed, epoch, len(self._records))).permutation(len(self._records))
            self._order = (epoch, order)
        return self._records[int(self._order[1][place])]
