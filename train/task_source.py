"""Batches of supervised records for fine-tuning: every epoch sees each record once, in an order of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from cpmbee.errors import DataError
from cpmbee.train.batches import TrainingBatch, TrainingSample, collate
from cpmbee.train.data.packing import fill_row
from cpmbee.train.data.prefetch import Prefetcher
from cpmbee.train.source import rows_of_rank
from cpmbee.train.task_samples import TaskSamples

logger = logging.getLogger("cpmbee.train")

WINDOW = 64  # samples to choose from when a row is filled
PREFETCHED_BATCHES = 4


class Position(NamedTuple):
    """Where a stream of rows is: the next row of an epoch, and how many batches its step has already."""

    epoch: int
    row: int
    batches: int = 0


class TaskSource:
    """A `cpmbee.train.source.BatchSource` of packed rows, without end, epoch after epoch.

    Which records share a row, and in which order rows and answers come, follows from the seed and the epoch alone. An
    epoch ends with a step of its own: the last batch has fewer rows, and where the step takes more batches than there
    are rows left, they are blank: one row without a token. So are the rows of processes that a batch has none for.

    Args:
        samples: of the records.
        row_length: most tokens of a row; longer records are left out, counted and said.
        batch_rows: rows of a global batch.
        accumulation: batches of a step.
        seed: of orders.
        rank: of this process.
        world_size: number of processes; their shares of a batch make the batch of one process.

    Attributes:
        tasks: names of the tasks.
        row_length: most tokens of a row.
        batch_rows: rows of a global batch.
        over_long: records that no row holds.
        tokens: of the records that are trained on.

    Raises:
        DataError: no record fits a row.
    """

    def __init__(
        self,
        samples: TaskSamples,
        *,
        row_length: int,
        batch_rows: int,
        accumulation: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._samples = samples
        self.row_length = row_length
        self.batch_rows = batch_rows
        self._accumulation = accumulation
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._position = Position(0, 0)  # behind the last batch handed out
        self._next = self._position  # behind the last batch made
        self._plan: tuple[int, list[list[int]]] = (-1, [])
        self._prefetcher: Prefetcher[tuple[TrainingBatch, Position]] | None = None
        lengths = samples.lengths
        (self._kept,) = np.nonzero(lengths <= row_length)
        self.tasks = samples.tasks
        self.tokens = int(lengths[self._kept].sum())
        self.over_long = len(lengths) - len(self._kept)
        if not len(self._kept):
            raise DataError(
                f"{samples.name}: all records are longer than a row of {row_length} tokens (the shortest has "
                f"{lengths.min()}); make rows longer"
            )
        if self.over_long:
            logger.warning(
                "%d of %d records are longer than a row of %d tokens (the longest has %d) and are left out",
                self.over_long, len(lengths), row_length, lengths.max(),
            )  # fmt: skip

    def rows(self, epoch: int) -> int:
        """Rows of an epoch."""
        return len(self._rows(epoch))

    def steps(self, epochs: int) -> int:
        """Steps that the first ``epochs`` epochs take together."""
        return sum(-(-self.rows(epoch) // (self.batch_rows * self._accumulation)) for epoch in range(epochs))

    def padding(self) -> float:
        """Share of the first epoch's positions that hold no token."""
        tokens = [sum(int(self._samples.lengths[index]) for index in row) for row in self._rows(0)]
        batches = [tokens[begin : begin + self.batch_rows] for begin in range(0, len(tokens), self.batch_rows)]
        return 1 - self.tokens / sum(len(batch) * max(batch) for batch in batches)

    @property
    def epochs_done(self) -> float:
        """Epochs that were handed out, the part of the last one included."""
        return self._position.epoch + self._position.row / self.rows(self._position.epoch)

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
        return {**self._identity(), **self._position._asdict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the batch after which ``state`` was taken.

        Raises:
            ValueError: the state is of a stream with other records, another seed or other rows.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ValueError(f"the saved data position has {name} {state.get(name)}, this run has {value}")
        self.close()
        self._position = self._next = Position(int(state["epoch"]), int(state["row"]), int(state.get("batches", 0)))

    def close(self) -> None:
        """Stop making batches ahead."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
        self._next = self._position

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "row_length": self.row_length,
            "batch_rows": self.batch_rows,
            "records": len(self._samples),
            "tokens": self.tokens,
        }

    def _make(self) -> tuple[TrainingBatch, Position]:
        epoch, row, batches = self._next
        rows = self._rows(epoch)
        if row == len(rows) and batches == 0:
            epoch, row = epoch + 1, 0
            rows = self._rows(epoch)
        end = min(row + self.batch_rows, len(rows))
        made = [[self._sample(index, epoch) for index in indices] for indices in rows[row:end]]
        made += [[] for _ in range(len(made), self._world_size)]
        self._next = Position(epoch, end, (batches + 1) % self._accumulation)
        return collate(made, self._samples.tokenizer), self._next

    def _rows(self, epoch: int) -> list[list[int]]:
        """The records of each row of an epoch."""
        planned, found = self._plan  # read at once: batches are made in another thread
        if planned == epoch:
            return found
        rng = np.random.default_rng((self._seed, epoch))
        waiting = rng.permutation(self._kept).tolist()
        lengths = self._samples.lengths
        rows = []
        window: list[int] = []
        begin = 0
        while begin < len(waiting) or window:
            fresh = waiting[begin : begin + WINDOW - len(window)]
            begin += len(fresh)
            window += fresh
            places = set(fill_row([int(lengths[index]) for index in window], self.row_length))
            rows.append([index for place, index in enumerate(window) if place in places])
            window = [index for place, index in enumerate(window) if place not in places]
        order = rng.permutation(len(rows))  # the last rows are the emptiest
        rows = [rows[i] for i in order]
        self._plan = (epoch, rows)
        return rows

    def _sample(self, index: int, epoch: int) -> TrainingSample:
        """A record, its answers in the order of an epoch."""
        return self._samples.make(index, np.random.default_rng((self._seed, epoch, index)))
