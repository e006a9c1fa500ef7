"""Supervised records as training samples: read and encoded once at the start, and again whenever they are needed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cpmbee.errors import CpmBeeError, DataError
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.batches import TrainingSample, encode_sample
from cpmbee.train.data.records import RecordSet
from cpmbee.train.jsonl import where
from cpmbee.train.tasks import TaskFields


class TaskSamples:
    """The samples of a record set.

    All records are read and encoded once, so that a bad one is found before the training begins; what is kept are
    their lengths, and samples are made anew when a batch needs them.

    Args:
        records: with their right answers.
        fields: what some of their fields mean.
        tokenizer: the vocabulary.

    Attributes:
        name: of the records, for messages.
        tokenizer: the vocabulary.
        tasks: names of the tasks.
        lengths: int64[N] tokens of every record.

    Raises:
        DataError: a record cannot be used; names file, line and path.
    """

    def __init__(self, records: RecordSet, fields: TaskFields, tokenizer: Tokenizer) -> None:
        self.name = records.name
        self.tokenizer = tokenizer
        self._records = records
        self._fields = fields
        self._numbers: dict[str, int] = {}  # of tasks
        self.lengths: NDArray[np.int64] = np.array([len(self.make(i, None)) for i in range(len(records))], np.int64)
        self.tasks = tuple(self._numbers)

    def __len__(self) -> int:
        return len(self._records)

    def make(self, index: int, rng: np.random.Generator | None) -> TrainingSample:
        """A record, encoded; ``rng`` shuffles its answers, None leaves them in order."""
        place = where(self._records, index)
        task = self._fields.read(self._records[index], place)
        number = self._numbers.setdefault(task.task, len(self._numbers))
        try:
            sample = encode_sample(task.request, self.tokenizer, rng=rng, task=number)
        except CpmBeeError as error:
            raise DataError(f"{place}: {error}") from None
        if sample.context.all():
            raise DataError(f"{place}: $.<ans>: holds no answer to learn")
        return sample
