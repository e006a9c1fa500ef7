"""Batches of supervised records for fine-tuning: every epoch sees each record once, in an order of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpmbee.errors import CpmBeeError, DataError
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.batches import TrainingBatch, TrainingSample, collate, encode_sample
from cpmbee.train.data.packing import fill_row
from cpmbee.train.data.prefetch import Prefetcher
from cpmbee.train.data.records import RecordSet
from cpmbee.train.jsonl import where
from cpmbee.train.source import rows_of_rank
from cpmbee.train.tasks import TaskFields

logger = logging.getLogger("cpmbee.train")

WINDOW = 64  # samples to choose from when a row is filled
PREFETCHED_BATCHES = 4


class Position(NamedTuple):
    """Where a stream of rows is: the next row of an epoch."""

    epoch: int
    row: int


class TaskSource:
    """A `cpmbee.train.source.BatchSource` of packed rows, without end, epoch after epoch.

    Which records share a row, and in which order rows and answers come, follows from the seed and the epoch alone. All
    records are read and encoded once at the start, so that a bad one is found before the training begins.

    Args:
        records: with their right answers.
        fields: what some of their fields mean.
        tokenizer: the vocabulary.
        row_length: most tokens of a row; longer records are left out, counted and said.
        batch_rows: rows of a global batch, at least one for each process.
        seed: of orders.
        rank: of this process.
        world_size: number of processes; their shares of a batch make the batch of one process.

    Attributes:
        tasks: names of the tasks.
        over_long: records that no row holds.
        tokens: of the records that are trained on.

    Raises:
        DataError: a record cannot be used (names file, line and path), or none fits a row.
        ValueError: there are fewer rows than processes.
    """

    def __init__(
        self,
        records: RecordSet,
        fields: TaskFields,
        tokenizer: Tokenizer,
        *,
        row_length: int,
        batch_rows: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_rows < world_size:
            raise ValueError(f"a global batch of {batch_rows} rows cannot be shared by {world_size} processes")
        self._records = records
        self._fields = fields
        self._tokenizer = tokenizer
        self._row_length = row_length
        self._batch_rows = batch_rows
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._numbers: dict[str, int] = {}  # of tasks
        self._position = Position(0, 0)  # behind the last batch handed out
        self._next = self._position  # behind the last batch made
        self._plan: tuple[int, list[list[int]]] = (-1, [])
        self._prefetcher: Prefetcher[tuple[TrainingBatch, Position]] | None = None
        lengths = np.array([len(self._sample(index, None)) for index in range(len(records))], np.int64)
        self._lengths: NDArray[np.int64] = lengths
        (self._kept,) = np.nonzero(lengths <= row_length)
        self.tasks = tuple(self._numbers)
        self.tokens = int(lengths[self._kept].sum())
        self.over_long = len(lengths) - len(self._kept)
        if self.over_long:
            logger.warning(
                "%d of %d records are longer than a row of %d tokens (the longest has %d) and are left out",
                self.over_long, len(lengths), row_length, lengths.max(),
            )  # fmt: skip
        if not len(self._kept):
            raise DataError(f"{records.name}: all records are longer than a row of {row_length} tokens")

    def rows(self, epoch: int) -> int:
        """Rows of an epoch."""
        return len(self._rows(epoch))

    def __iter__(self) -> Iterator[TrainingBatch]:
        """Go on from the current position."""
        self.close()
        self._prefetcher = Prefetcher(self._make, PREFETCHED_BATCHES)
        try:
            while True:
                batch, position = self._prefetcher.get()
                self._position = position
                yield rows_of_rank(batch, self._rank, self._world_size)
        finally:
            self.close()

    def state_dict(self) -> dict[str, Any]:
        """The position, and what the stream is made from."""
        return {**self._identity(), "epoch": self._position.epoch, "row": self._position.row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the batch after which ``state`` was taken.

        Raises:
            ValueError: the state is of a stream with other records, another seed or other rows.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(f"the saved data position has {name} {state.get(name)}, this run has {value}")
        self.close()
        self._position = self._next = Position(int(state["epoch"]), int(state["row"]))

    def close(self) -> None:
        """Stop making batches ahead."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        self._next = self._position

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "row_length": self._row_length,
            "batch_rows": self._batch_rows,
            "records": len(self._records),
            "tokens": self.tokens,
        }

    def _make(self) -> tuple[TrainingBatch, Position]:
        epoch, row = self._next
        made: list[list[TrainingSample]] = []
        while len(made) < self._batch_rows:
            rows = self._rows(epoch)
            if row == len(rows):
                epoch, row = epoch + 1, 0
                continue
            made.append([self._sample(index, epoch) for index in rows[row]])
            row += 1
        self._next = Position(epoch, row)
        return collate(made, self._tokenizer), self._next

    def _rows(self, epoch: int) -> list[list[int]]:
        """The records of each row of an epoch."""
        if self._plan[0] == epoch:
            return self._plan[1]
        rng = np.random.default_rng((self._seed, epoch))
        waiting = rng.permutation(self._kept).tolist()
        rows = []
        window: list[int] = []
        begin = 0
        while begin < len(waiting) or window:
            fresh = waiting[begin : begin + WINDOW - len(window)]
            begin += len(fresh)
            window += fresh
            places = set(fill_row([int(self._lengths[index]) for index in window], self._row_length))
            rows.append([index for place, index in enumerate(window) if place in places])
            window = [index for place, index in enumerate(window) if place not in places]
        order = rng.permutation(len(rows))  # the last rows are the emptiest
        self._plan = (epoch, [rows[i] for i in order])
        return self._plan[1]

    def _sample(self, index: int, epoch: int | None) -> TrainingSample:
        """A record, encoded; its answers in the order of an epoch."""
        place = where(self._records, index)
        task = self._fields.read(self._records[index], place)
        rng = None if epoch is None else np.random.default_rng((self._seed, epoch, index))
        number = self._numbers.setdefault(task.task, len(self._numbers))
        try:
            sample = encode_sample(task.request, self._tokenizer, rng=rng, task=number)
        except CpmBeeError as error:
            raise DataError(f"{place}: {error}") from None
        if sample.context.all():
            raise DataError(f"{place}: $.<ans>: holds no answer to learn")
        return sample
