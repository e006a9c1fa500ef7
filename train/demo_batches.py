"""The batches that the demo model is trained on: its tasks mixed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np

from cpmbee.tokenizer import Tokenizer
from cpmbee.train.batches import TrainingSample, encode_sample
from cpmbee.train.demo_data import TASKS, DemoData
from cpmbee.train.drawn_batches import DrawnBatches


class DemoBatches(DrawnBatches):
    """Samples of all tasks.

    Args:
        data: to train on.
        tokenizer: its vocabulary.
        batch_size: rows.
        seed: of everything that is drawn.
        rank: of this process.
        world_size: processes that share the rows of a batch.
    """

    tasks = TASKS

    def __init__(
        self,
        data: DemoData,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(tokenizer, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size)
        self._data = data

    def _samples(self, number: int, count: int, rng: np.random.Generator) -> Iterator[TrainingSample]:
        for task, request in islice(self._data.samples(rng), count):
            yield encode_sample(request, self._tokenizer, task=task)
