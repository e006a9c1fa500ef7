"""What the relation between two tokens depends on, as one row of int32 per property."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cpmbee.errors import PromptError

if TYPE_CHECKING:
    from cpmbee.encoding import Int32, Prompt

SEGMENT, SAMPLE, POSITION, CONTEXT, SPAN, NUM_SEGMENTS, REL_OFFSET = range(7)
NUM_COLUMNS = 7


def prompt_columns(prompt: Prompt) -> Int32:
    """The columns of an encoded request, int32[7, T]."""
    columns = np.zeros((NUM_COLUMNS, len(prompt.input_ids)), np.int32)
    columns[SEGMENT] = prompt.segment_ids
    columns[SAMPLE] = prompt.sample_ids
    columns[POSITION] = prompt.positions
    columns[CONTEXT] = prompt.context
    columns[NUM_SEGMENTS] = prompt.num_segments
    columns[REL_OFFSET] = prompt.rel_offset
    return columns


def packed_columns(
    context: npt.NDArray[Any],
    sample_ids: Int32,
    num_segments: Int32,
    segment_ids: Int32,
    segment_rel_offset: Int32,
    segment_rel: Int32,
    spans: Int32,
    length: Int32,
) -> Iterator[tuple[Int32, Int32]]:
    """Each row of a packed training batch: its columns without the padding, and its segment relations.

    Raises:
        PromptError: the arrays do not fit each other.
    """
    width = np.shape(context)[-1]
    rows = len(context)
    given = (segment_ids, sample_ids, context, spans, num_segments, segment_rel_offset)
    matrices = {np.shape(column) for column in given} == {(rows, width)}
    if not matrices or np.shape(length) != (rows,) or np.ndim(segment_rel) != 2 or len(segment_rel) != rows:
        raise PromptError("the arrays of a packed batch do not have the same shape")
    for row in range(rows):
        tokens = int(length[row])
        if not 0 <= tokens <= width:
            raise PromptError(f"row {row} of the batch: length {tokens} is not in 0..{width}")
        columns = np.empty((NUM_COLUMNS, tokens), np.int32)
        columns[POSITION] = np.arange(tokens)
        for index, column in zip((SEGMENT, SAMPLE, CONTEXT, SPAN, NUM_SEGMENTS, REL_OFFSET), given, strict=True):
            columns[index] = column[row, :tokens]
        yield columns, segment_rel[row]
