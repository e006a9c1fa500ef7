"""In-context examples of an evaluation: the same solved records before every request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cpmbee.errors import CpmBeeError, DataError
from cpmbee.prompt import encode_data
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.data.records import RecordSet
from cpmbee.train.jsonl import where
from cpmbee.train.tasks import TaskFields, TaskRecord


def choose_shots(
    records: RecordSet, fields: TaskFields, tokenizer: Tokenizer, count: int | None = None, seed: int = 0
) -> list[TaskRecord]:
    """The examples: all records, or some of them that the seed draws.

    Args:
        records: with their right answers.
        fields: what some of their fields mean; what the model does not see of a request it does not see of an example.
        tokenizer: of the model.
        count: how many to draw; None takes all, in order.
        seed: of the drawing and of the order of what is drawn.

    Raises:
        DataError: there are fewer, or one of them cannot be used; names it.
    """
    if count is not None and count > len(records):
        raise DataError(f"{records.name}: {count} examples are wanted, and there are {len(records)} records")
    indices = range(len(records)) if count is None else np.random.default_rng(seed).permutation(len(records))[:count]
    shots = [fields.read(records[int(index)], where(records, int(index))) for index in indices]
    for shot in shots:
        try:
            encode_data(shot.request, tokenizer)
        except CpmBeeError as error:
            raise DataError(f"{shot.where}: {error}") from None
    return shots


def without_shots(records: Sequence[TaskRecord], shots: Sequence[TaskRecord]) -> list[TaskRecord]:
    """The records that are not among the examples, whose answers the model reads.

    Raises:
        DataError: none is left.
    """
    shown = [shot.request for shot in shots]
    left = [record for record in records if record.request not in shown]
    if not left:
        raise DataError(
            f"{records[0].where}: this and all other records are among the examples; nothing is left to ask"
        )
    return left
