"""Training batches: requests with their answers, encoded, packed into rows, with a target for every answer token.

A row holds several samples end to end; each token carries the number of its sample in the row (its *span*), and
tokens of different spans never see each other. A sample may bring in-context examples, which follow it in its span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmbee.model import IGNORE_INDEX
from cpmbee.prompt import EncodedData, encode_data
from cpmbee.relation import RelationBuilder
from cpmbee.tokenizer import Tokenizer

Int32Array = NDArray[np.int32]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class TrainingSample:
    """One request with answers, followed by its in-context examples; T tokens.

    Attributes:
        input_ids: int32[T] base ids.
        input_subs: int32[T] subscripts.
        segment_ids: int32[T], counted within the request or example.
        sample_ids: int32[T], 0 for the request, i + 1 for its i-th example.
        num_segments: int32[T] segments of the token's request or example.
        rel_offset: int32[T] where that one's buckets start in ``segment_rel``.
        context: bool[T], false for the answers of the request (those of examples are context).
        segment_rel: int32[R] buckets between segments, S * S per request or example.
        task: number of the task it belongs to.
    """

    input_ids: Int32Array
    input_subs: Int32Array
    segment_ids: Int32Array
    sample_ids: Int32Array
    num_segments: Int32Array
    rel_offset: Int32Array
    context: BoolArray
    segment_rel: Int32Array
    task: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class TrainingBatch:
    """B packed rows of T tokens; positions from ``length`` on are padding.

    Attributes:
        input_ids: int32[B, T] base ids.
        input_subs: int32[B, T] subscripts.
        length: int32[B] tokens in use.
        context: bool[B, T], false for answers and padding.
        sample_ids: int32[B, T].
        num_segments: int32[B, T].
        segment_ids: int32[B, T].
        segment_rel_offset: int32[B, T] into the row of ``segment_rel``.
        segment_rel: int32[B, R].
        spans: int32[B, T] number of the sample in its row.
        task_ids: int32[B, T] number of the task of the token's sample, -1 on padding.
        targets: int32[B, T], what should follow: a base id, ``vocab_size`` + row of the extension vocabulary, or
            `IGNORE_INDEX`.
        ext_ids: int32[E] base ids of the extension vocabulary, in order of first sight.
        ext_subs: int32[E] its subscripts.
    """

    input_ids: Int32Array
    input_subs: Int32Array
    length: Int32Array
    context: BoolArray
    sample_ids: Int32Array
    num_segments: Int32Array
    segment_ids: Int32Array
    segment_rel_offset: Int32Array
    segment_rel: Int32Array
    spans: Int32Array
    task_ids: Int32Array
    targets: Int32Array
    ext_ids: Int32Array
    ext_subs: Int32Array

    def relation(self, builder: RelationBuilder) -> NDArray[np.int16]:
        """The relation matrix of every row, int16[B, T, T], -1 where a query may not look."""
        return builder.packed(
            context=self.context,
            sample_ids=self.sample_ids,
            num_segments=self.num_segments,
            segment_ids=self.segment_ids,
            segment_rel_offset=self.segment_rel_offset,
            segment_rel=self.segment_rel,
            spans=self.spans,
            length=self.length,
        )


def encode_sample(
    data: dict[str, Any],
    tokenizer: Tokenizer,
    examples: Sequence[dict[str, Any]] = (),
    rng: np.random.Generator | None = None,
    task: int = 0,
) -> TrainingSample:
    """Encode a request whose answers are filled in, with its in-context examples.

    Args:
        data: nested dict; leaves under ``<ans>`` are what the model should write.
        tokenizer: the vocabulary.
        examples: solved requests that the model sees as context.
        rng: shuffles the keys below ``<ans>``; None keeps the order given.
        task: number of the task it belongs to.

    Raises:
        PromptError: a request is not a nested dict of strings.
        TokenizeError: a text cannot be tokenized.
    """
    parts: list[EncodedData] = []
    for part in (data, *examples):
        parts.append(encode_data(part, tokenizer, parts[-1] if parts else None, rng))
    lengths = [len(part.input_ids) for part in parts]
    rel_starts = list(accumulate((len(part.segment_rel) for part in parts[:-1]), initial=0))

    def per_token(values: Sequence[int]) -> Int32Array:
        return np.repeat(np.array(values, np.int32), lengths)

    def joined(name: str) -> Any:
        columns = [getattr(part, name) for part in parts]
        return columns[0] if len(columns) == 1 else np.concatenate(columns)

    context = joined("context")
    context[lengths[0] :] = True
    return TrainingSample(
        input_ids=joined("input_ids"),
        input_subs=joined("input_subs"),
        segment_ids=joined("segment_ids"),
        sample_ids=per_token(range(len(parts))),
        num_segments=per_token([part.num_segments for part in parts]),
        rel_offset=per_token(rel_starts),
        context=context,
        segment_rel=joined("segment_rel"),
        task=task,
    )


def collate(
    rows: Sequence[Sequence[TrainingSample]], tokenizer: Tokenizer, row_length: int | None = None
) -> TrainingBatch:
    """Lay out packed rows as one batch.

    Args:
        rows: the samples of each row; a row without any is blank, all padding.
        tokenizer: the vocabulary the samples were encoded with.
        row_length: T; None takes the longest row's length, at least 1.

    Raises:
        ValueError: a row is longer than ``row_length``.
    """
    used = [sum(map(len, row)) for row in rows]
    width = max(1, *used) if row_length is None else row_length
    if max(used) > width:
        raise ValueError(f"a row has {max(used)} tokens, more than row_length {width}")
    rel_width = max(sum(len(sample.segment_rel) for sample in row) for row in rows)

    def column() -> Int32Array:
        return np.zeros((len(rows), width), np.int32)

    ids, subs = column(), column()
    ids[:] = tokenizer.pad_id
    sample_ids, num_segments, segment_ids, rel_offset, spans = column(), column(), column(), column(), column()
    task_ids = np.full((len(rows), width), -1, np.int32)
    context = np.zeros((len(rows), width), np.bool_)
    segment_rel = np.zeros((len(rows), rel_width), np.int32)
    for number, row in enumerate(rows):
        start = rel_start = 0
        for span, sample in enumerate(row):
            here = (number, slice(start, start + len(sample)))
            ids[here], subs[here], context[here] = sample.input_ids, sample.input_subs, sample.context
            sample_ids[here], num_segments[here] = sample.sample_ids, sample.num_segments
            segment_ids[here], rel_offset[here] = sample.segment_ids, sample.rel_offset + rel_start
            spans[here], task_ids[here] = span, sample.task
            segment_rel[number, rel_start : rel_start + len(sample.segment_rel)] = sample.segment_rel
            start, rel_start = start + len(sample), rel_start + len(sample.segment_rel)
    length = np.asarray(used, np.int32)
    columns, ext_ids, ext_subs = _extension_columns(ids, subs, tokenizer.vocab_size)
    return TrainingBatch(
        input_ids=ids,
        input_subs=subs,
        length=length,
        context=context,
        sample_ids=sample_ids,
        num_segments=num_segments,
        segment_ids=segment_ids,
        segment_rel_offset=rel_offset,
        segment_rel=segment_rel,
        spans=spans,
        task_ids=task_ids,
        targets=_targets(columns, context, length, tokenizer),
        ext_ids=ext_ids,
        ext_subs=ext_subs,
    )


def _extension_columns(ids: Int32Array, subs: Int32Array, vocab_size: int) -> tuple[Int32Array, Int32Array, Int32Array]:
    """The logit column of every token, and the extension vocabulary (base ids, subscripts) the columns count from."""
    columns = ids.copy()
    rows: dict[tuple[int, int], int] = {}
    for where in zip(*np.nonzero(subs), strict=True):
        columns[where] = vocab_size + rows.setdefault((int(ids[where]), int(subs[where])), len(rows))
    table = np.asarray(list(rows), np.int32).reshape(-1, 2)
    return columns, table[:, 0].copy(), table[:, 1].copy()


def _targets(columns: Int32Array, context: BoolArray, length: Int32Array, tokenizer: Tokenizer) -> Int32Array:
    """What should follow each answer token (the opening ``<s>`` is one): the next token, or ``</s>`` at its end."""
    following = np.full_like(columns, tokenizer.eos_id)
    following[:, :-1] = np.where(columns[:, 1:] == tokenizer.bos_id, tokenizer.eos_id, columns[:, 1:])
    rows = np.arange(len(columns))
    following[rows, length - 1] = tokenizer.eos_id
    in_use = np.arange(columns.shape[1]) < length[:, None]
    return np.where(~context & in_use, following, np.int32(IGNORE_INDEX)).astype(np.int32)
