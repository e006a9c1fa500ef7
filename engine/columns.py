"""What the relation between two tokens depends on, as one row of int32 per property."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmbee.encoding import Int32, Prompt
from cpmbee.errors import PromptError

SEGMENT, SAMPLE, POSITION, CONTEXT, SPAN, NUM_SEGMENTS, REL_OFFSET = range(7)
NUM_COLUMNS = 7
_INT32 = np.dtype(np.int32)
_INT32_MAX = 2**31 - 1


def int32_array(name: str, values: npt.ArrayLike) -> Int32:
    """Integers as int32; an array that is int32 already is not copied.

    Raises:
        PromptError: ``values`` are not integers, or not of 32 bits; names them.
    """
    if type(values) is np.ndarray and values.dtype is _INT32:
        return values
    try:
        array = np.asarray(values)
    except (OverflowError, TypeError, ValueError):
        raise PromptError(f"{name} must be an array of integers") from None
    if array.dtype in (_INT32, np.bool_):
        return array.astype(_INT32, copy=False)
    if array.size and array.dtype.kind not in "iu":
        raise PromptError(f"{name} must be integers, not {array.dtype}")
    if array.size and not -_INT32_MAX <= int(array.min()) <= int(array.max()) <= _INT32_MAX:
        raise PromptError(f"{name} has numbers that do not fit 32 bits")
    return array.astype(np.int32)


def int32_number(name: str, value: object) -> int:
    """One integer.

    Raises:
        PromptError: ``value`` is no integer, or has more than 32 bits; names it.
    """
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise PromptError(f"{name} must be an integer, not {type(value).__name__}") from None
    if not -_INT32_MAX <= number <= _INT32_MAX:
        raise PromptError(f"{name} does not fit 32 bits")
    return int(number)


def prompt_columns(prompt: Prompt) -> Int32:
    """The columns of an encoded request, int32[7, T].

    Raises:
        PromptError: it is none, or its arrays do not fit each other.
    """
    if not isinstance(prompt, Prompt):
        raise PromptError(f"expected an encoded Prompt, not {type(prompt).__name__}")
    size = len(prompt.input_ids)
    columns = np.zeros((NUM_COLUMNS, size), np.int32)
    given = (prompt.segment_ids, prompt.sample_ids, prompt.positions, prompt.context, prompt.num_segments)
    rows = (SEGMENT, SAMPLE, POSITION, CONTEXT, NUM_SEGMENTS, REL_OFFSET)
    for row, values in zip(rows, (*given, prompt.rel_offset), strict=True):
        column = int32_array("the arrays of a prompt", values)
        if column.shape != (size,):
            raise PromptError("the arrays of a prompt do not have the same length")
        columns[row] = column
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
    names = ("segment_ids", "sample_ids", "context", "spans", "num_segments", "segment_rel_offset")
    columns = (segment_ids, sample_ids, context, spans, num_segments, segment_rel_offset)
    given = [int32_array(name, column) for name, column in zip(names, columns, strict=True)]
    rel, lengths = int32_array("segment_rel", segment_rel), int32_array("length", length)
    if given[0].ndim != 2 or len({column.shape for column in given}) != 1:
        raise PromptError("the arrays of a packed batch do not have the same shape")
    rows, width = given[0].shape
    if lengths.shape != (rows,) or rel.ndim != 2 or len(rel) != rows:
        raise PromptError("the arrays of a packed batch do not have the same shape")
    return _packed_rows(given, rel, lengths, width)


def _packed_rows(given: list[Int32], rel: Int32, lengths: Int32, width: int) -> Iterator[tuple[Int32, Int32]]:
    for row, tokens in enumerate(map(int, lengths)):
        if not 0 <= tokens <= width:
            raise PromptError(f"row {row} of the batch: length {tokens} is not in 0..{width}")
        columns = np.empty((NUM_COLUMNS, tokens), np.int32)
        columns[POSITION] = np.arange(tokens)
        for index, column in zip((SEGMENT, SAMPLE, CONTEXT, SPAN, NUM_SEGMENTS, REL_OFFSET), given, strict=True):
            columns[index] = column[row, :tokens]
        yield columns, rel[row]
