"""Batches of samples that are drawn without end: rows of about one length together, resumable by the position alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cpmbee.errors import DataError
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.batches import TrainingBatch, TrainingSample, collate
from cpmbee.train.source import rows_of_rank

BATCHES_PER_DRAW = 16


class DrawnBatches(ABC):
    """An endless stream of batches with one sample a row; a `cpmbee.train.source.BatchSource`.

    Samples are drawn for several batches at once and sorted by length, so that little is padding; the batches of one
    draw come in random order. Every draw has a random state of its own, made from the seed and its number: the
    position alone says how to go on.

    Args:
        tokenizer: the vocabulary.
        batch_size: rows.
        seed: of everything that is drawn.
        rank: of this process.
        world_size: processes that share the rows of a batch.
    """

    tasks: Sequence[str]

    def __init__(self, tokenizer: Tokenizer, *, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._position = 0  # batches handed out

    @abstractmethod
    def _samples(self, number: int, count: int, rng: np.random.Generator) -> Iterable[TrainingSample]:
        """The ``count`` samples of draw ``number``."""

    def __iter__(self) -> Iterator[TrainingBatch]:
        """Go on from the current position."""
        while True:
            number, first = divmod(self._position, BATCHES_PER_DRAW)
            for batch in self._draw(number, first):
                self._position += 1
                yield rows_of_rank(batch, self._rank, self._world_size)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what the stream was made from."""
        return {"position": self._position, "seed": self._seed, "batch_size": self._batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind ``state["position"]`` batches.

        Raises:
            DataError: the state is of a stream with another seed or batch size.
        """
        if (state["seed"], state["batch_size"]) != (self._seed, self._batch_size):
            raise DataError("the state belongs to a stream with another seed or batch size")
        self._position = int(state["position"])

    def _draw(self, number: int, first: int) -> Iterator[TrainingBatch]:
        """The batches of one draw from the ``first`` on."""
        rng = np.random.default_rng((self._seed, number))
        samples = sorted(self._samples(number, BATCHES_PER_DRAW * self._batch_size, rng), key=len)
        for start in rng.permutation(BATCHES_PER_DRAW)[first:] * self._batch_size:
            yield collate([[sample] for sample in samples[start : start + self._batch_size]], self._tokenizer)
