"""The arrays that a nested dict becomes, and the limits on what can be encoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

MAX_DEPTH = 8  # levels that segment buckets tell apart
MAX_SEGMENTS = 1024  # per sample; its table of relations has the square of that
MAX_NESTING = 64  # dicts in dicts
DIFFERENT_SAMPLE = 1  # the segment bucket between a request and its examples

Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]


class AnswerSlot(NamedTuple):
    """One leaf under ``<ans>`` that the model writes.

    Attributes:
        path: keys below ``<ans>`` that lead to it; empty when ``<ans>`` itself is the leaf.
        segment_id: segment of the tokens written there.
    """

    path: tuple[str, ...]
    segment_id: int


@dataclass(slots=True, eq=False)
class EncodedData:
    """One sample, answers included (what training sees).

    Attributes:
        input_ids: int32[T], token ids; specials and unknown text by the id of their group.
        input_subs: int32[T], subscript inside the group, 0 for plain tokens.
        segment_ids: int32[T].
        context: bool[T], False in the leaves under ``<ans>``.
        segment_rel: int32[S * S], bucket from a query's segment (row) to a key's.
        num_segments: S.
        ext_table: ext id (vocab_size and up) -> text, of this sample and those encoded before it.
        token_id_table: group -> {ext id: subscript}, likewise.
    """

    input_ids: Int32
    input_subs: Int32
    segment_ids: Int32
    context: Bool
    segment_rel: Int32
    num_segments: int
    ext_table: dict[int, str] = field(default_factory=dict)
    token_id_table: dict[str, dict[int, int]] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Prompt:
    """A request ready to run: its tokens, then those of its examples.

    Attributes:
        input_ids: int32[T], token ids; specials and unknown text by the id of their group.
        input_subs: int32[T], subscript inside the group, 0 for plain tokens.
        segment_ids: int32[T], per sample from 0.
        sample_ids: int32[T], 0 is the request, i + 1 the i-th example.
        positions: int32[T], 0 to T - 1.
        num_segments: int32[T], segments of the token's sample.
        rel_offset: int32[T], where the token's sample starts in `segment_rel`.
        context: bool[T], all True.
        segment_rel: int32[R], the samples' tables of S * S buckets, one after the other.
        answers: what to write, in order.
        ext_tokens: (base id, subscript) -> text of each special or unknown token that an answer may use.
        num_samples: 1 + number of examples.
    """

    input_ids: Int32
    input_subs: Int32
    segment_ids: Int32
    sample_ids: Int32
    positions: Int32
    num_segments: Int32
    rel_offset: Int32
    context: Bool
    segment_rel: Int32
    answers: tuple[AnswerSlot, ...]
    ext_tokens: dict[tuple[int, int], str]
    num_samples: int

    def __len__(self) -> int:
        """Number of tokens, T."""
        return len(self.input_ids)


Data = dict[str, Any]
