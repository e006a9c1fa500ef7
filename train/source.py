"""What the trainer reads: a stream of batches that knows where it is, so that a stopped run goes on with the next one.

In a run of many processes every process draws the same global stream and keeps its own rows of each batch, so that N
processes see the batches of one; `rows_of_rank` does the keeping.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from cpmbee.errors import ConfigError
from cpmbee.train.batches import TrainingBatch

_WHOLE_BATCH = ("ext_ids", "ext_subs")  # columns that the rows of a batch share


@runtime_checkable
class BatchSource(Protocol):
    """A resumable stream of training batches.

    `cpmbee.train.trainer.Trainer.train` also takes any other iterable of batches, which cannot be resumed and has one
    task.
    """

    @property
    def tasks(self) -> Sequence[str]:
        """Names of the tasks that the batches' ``task_ids`` index; may grow while batches are read."""
        ...

    def __iter__(self) -> Iterator[TrainingBatch]:
        """Go on from the current position; called once a run."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position and random state behind the last batch handed out, as plain JSON data; equal on every process."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as if every batch up to ``state`` had been handed out.

        Raises:
            ValueError: the state does not belong to this source.
        """
        ...


def rows_of_rank(batch: TrainingBatch, rank: int, world_size: int) -> TrainingBatch:
    """The contiguous share of a global batch that one process trains on.

    The width and the extension vocabulary stay those of the global batch: the loss of a token must not depend on how
    many processes share the work.

    Raises:
        ConfigError: there are fewer rows than processes.
    """
    rows = len(batch.input_ids)
    if rows < world_size:
        raise ConfigError(f"a global batch of {rows} rows cannot be shared by {world_size} processes")
    share = slice(rank * rows // world_size, (rank + 1) * rows // world_size)
    columns = {field.name: getattr(batch, field.name) for field in fields(batch) if field.name not in _WHOLE_BATCH}
    return replace(batch, **{name: np.ascontiguousarray(column[share]) for name, column in columns.items()})
