"""The relation builder in plain NumPy: what `cpmbee._relation` computes, said simply."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cpmbee.columns import (
    CONTEXT,
    NUM_COLUMNS,
    NUM_SEGMENTS,
    POSITION,
    REL_OFFSET,
    SAMPLE,
    SEGMENT,
    SPAN,
    int32_array,
    int32_number,
    packed_columns,
    prompt_columns,
)
from cpmbee.config import ModelConfig
from cpmbee.distance import signed_distance_buckets
from cpmbee.encoding import DIFFERENT_SAMPLE, Int32
from cpmbee.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from cpmbee.encoding import Prompt


class TokenLayout:
    """What the relation matrix needs to know about a sequence of tokens; grows as tokens are generated.

    The order of tokens is the causal order: an answer token sees answer tokens up to itself.

    Args:
        columns: int32[7, T]; rows are segment id, sample id, position, context (0 or 1), span, number of segments of
            the sample, and where the sample starts in ``segment_rel``.
        segment_rel: int32[R], tables of segment buckets. It is not copied and must not change.
        reserve: tokens that will be appended, a hint.

    Raises:
        PromptError: the arrays are not integers of these shapes, or a column points outside ``segment_rel``.
    """

    length: int = 0  # of one whose __init__ was not called, or failed
    segment_rel: Int32 = np.empty(0, np.int32)
    _columns: Int32 = np.empty((NUM_COLUMNS, 0), np.int32)

    def __init__(self, columns: npt.ArrayLike, segment_rel: Int32, reserve: int = 0) -> None:
        self.length = 0
        given, rel = int32_array("token columns", columns), int32_array("segment_rel", segment_rel)
        if given.ndim != 2 or given.shape[0] != NUM_COLUMNS:
            raise PromptError(f"token columns must have shape ({NUM_COLUMNS}, T), not {given.shape}")
        if rel.ndim != 1:
            raise PromptError("segment_rel must have one dimension")
        segments = given[NUM_SEGMENTS].astype(np.int64)
        ends = given[REL_OFFSET] + segments * segments
        inside = (given[SEGMENT] >= 0) & (given[SEGMENT] < segments) & (given[REL_OFFSET] >= 0) & (ends <= len(rel))
        if not inside.all():
            raise PromptError(f"token {int(inside.argmin())} points outside the table of segment relations")
        self.length = given.shape[1]
        self.segment_rel = np.ascontiguousarray(rel)
        self._columns = given.copy()
        self._columns[CONTEXT] = given[CONTEXT] != 0

    @classmethod
    def from_prompt(cls, prompt: Prompt, reserve: int = 0) -> TokenLayout:
        """The layout of an encoded request, with room for ``reserve`` answer tokens."""
        return cls(prompt_columns(prompt), prompt.segment_rel, reserve)

    @property
    def columns(self) -> Int32:
        """int32[7, T], read-only: the tokens' columns as they are now."""
        view = self._columns[:, : self.length]
        view.flags.writeable = False
        return view

    def append(self, segment_id: int, position: int, context: bool = False, sample_id: int = 0, span: int = 0) -> None:
        """Add one token to a sample that the layout already has.

        Raises:
            PromptError: the sample, or the segment in it, does not exist, or a number is none of 32 bits.
        """
        segment, place = int32_number("segment_id", segment_id), int32_number("position", position)
        sample, row = int32_number("sample_id", sample_id), int32_number("span", span)
        known = self._columns[:, : self.length]
        same = np.flatnonzero((known[SAMPLE] == sample) & (known[SPAN] == row))
        if not len(same):
            raise PromptError(f"cannot append to sample {sample} of span {row}: it has no tokens")
        segments, offset = (int(known[column, same[-1]]) for column in (NUM_SEGMENTS, REL_OFFSET))
        if not 0 <= segment < segments:
            raise PromptError(f"cannot append to segment {segment}: the sample has {segments}")
        if self.length == self._columns.shape[1]:
            room = np.zeros((NUM_COLUMNS, max(16, self.length // 2)), np.int32)
            self._columns = np.concatenate([self._columns, room], axis=1)
        self._columns[:, self.length] = (segment, sample, place, bool(context), row, segments, offset)
        self.length += 1

    def truncate(self, length: int) -> None:
        """Forget the tokens from index ``length`` on.

        Raises:
            PromptError: the layout has fewer.
        """
        kept = int32_number("length", length)
        if not 0 <= kept <= self.length:
            raise PromptError(f"cannot truncate a layout of {self.length} tokens to {kept}")
        self.length = kept

    def take(self, indices: npt.ArrayLike, reserve: int = 0) -> TokenLayout:
        """A layout of the tokens at ``indices``, in that order: a part, or examples before the request.

        Raises:
            PromptError: an index is out of range.
        """
        chosen = int32_array("indices", indices)
        if chosen.ndim != 1 or (chosen.size and not 0 <= int(chosen.min()) <= int(chosen.max()) < self.length):
            raise PromptError(f"indices must be a list of numbers from 0 to {self.length - 1}")
        return type(self)(self._columns[:, chosen], self.segment_rel, reserve)

    def copy(self, reserve: int = 0) -> TokenLayout:
        """An independent layout of the same tokens."""
        return type(self)(self._columns[:, : self.length], self.segment_rel, reserve)

    def __len__(self) -> int:
        return self.length


class RelationBuilder:
    """Writes the relation matrix: for each query and key the row of the bias table, or -1 for "may not look".

    Args:
        config: its number of buckets and the greatest distance.

    Raises:
        ConfigError: ``config`` is no `ModelConfig`.
    """

    _distances: npt.NDArray[np.int16] | None = None  # of one whose __init__ was not called, or failed

    def __init__(self, config: ModelConfig) -> None:
        if not isinstance(config, ModelConfig):
            raise ConfigError(f"expected a ModelConfig, not {type(config).__name__}")
        self._buckets = config.position_bias_num_buckets
        self._segment_buckets = config.position_bias_num_segment_buckets
        self._reach = config.position_bias_max_distance
        self._distances = signed_distance_buckets(config)

    def fill(self, out: npt.NDArray[np.int16], layout: TokenLayout, q_start: int = 0) -> None:
        """Write the rows of the queries from ``q_start`` to the layout's end.

        Args:
            out: int16[Q, W], Q queries, W >= T keys; what lies past key T becomes -1.
            layout: the T tokens.
            q_start: index of the first query.

        Raises:
            PromptError: a segment bucket has no row in the bias table, or ``q_start`` or ``layout`` is something else.
            ValueError: ``out`` has another type or shape, or its rows overlap.
        """
        if self._distances is None:
            raise ConfigError("this RelationBuilder has no configuration: its __init__ was not called, or failed")
        if not isinstance(layout, TokenLayout):
            raise PromptError(f"expected a TokenLayout, not {type(layout).__name__}")
        start = int32_number("q_start", q_start)
        queries = layout.length - start
        if not isinstance(out, np.ndarray) or out.dtype != np.int16 or out.ndim != 2 or not out.flags.writeable:
            raise ValueError("out must be an int16 matrix")
        if not 0 <= start <= layout.length or out.shape[0] != queries or out.shape[1] < layout.length:
            raise ValueError(f"out has shape {out.shape}; {queries} queries and {layout.length} keys do not fit it")
        if queries and out.shape[1] > 1 and out.strides[1] != out.itemsize:
            raise ValueError("the rows of out must be contiguous")
        if queries > 1 and abs(out.strides[0]) < out.shape[1] * out.itemsize:
            raise ValueError("the rows of out must not overlap")
        rows = self._rows(layout.columns, layout.segment_rel, start, self._distances)
        out[:, : layout.length] = rows
        out[:, layout.length :] = -1

    def packed(
        self,
        context: npt.NDArray[Any],
        sample_ids: Int32,
        num_segments: Int32,
        segment_ids: Int32,
        segment_rel_offset: Int32,
        segment_rel: Int32,
        spans: Int32,
        length: Int32,
    ) -> npt.NDArray[np.int16]:
        """The relation matrices of a packed training batch, where positions count from 0 in each row.

        Args:
            context: bool or int[B, T].
            sample_ids: int32[B, T].
            num_segments: int32[B, T].
            segment_ids: int32[B, T].
            segment_rel_offset: int32[B, T].
            segment_rel: int32[B, R].
            spans: int32[B, T]; tokens of different spans never see each other.
            length: int32[B], tokens of each row; the rest is padding.

        Returns:
            int16[B, T, T].

        Raises:
            PromptError: an array points outside another, or a segment bucket has no row in the bias table.
        """
        rows = packed_columns(
            context, sample_ids, num_segments, segment_ids, segment_rel_offset, segment_rel, spans, length
        )
        batch, width = np.shape(context)
        out = np.full((batch, width, width), -1, np.int16)
        for matrix, (columns, rel) in zip(out, rows, strict=True):
            self.fill(matrix[: columns.shape[1]], TokenLayout(columns, rel))
        return out

    def _rows(
        self, columns: Int32, segment_rel: Int32, q_start: int, distances: npt.NDArray[np.int16]
    ) -> npt.NDArray[np.int64]:
        keys = columns.astype(np.int64)[:, None, :]  # (columns, 1, keys)
        queries = columns[:, q_start:].astype(np.int64)[:, :, None]  # (columns, queries, 1)
        same_sample = (queries[SAMPLE] == keys[SAMPLE]) & (queries[SPAN] == keys[SPAN])
        order = np.arange(columns.shape[1])
        earlier = order[None, :] <= order[q_start:, None]
        visible = (keys[CONTEXT] == 1) | ((queries[CONTEXT] == 0) & earlier)
        visible = visible & (queries[SPAN] == keys[SPAN]) & ((queries[SAMPLE] == 0) | same_sample)

        index = queries[SEGMENT] * queries[NUM_SEGMENTS] + keys[SEGMENT] + queries[REL_OFFSET]
        needed = index[visible & same_sample]
        if needed.size and not 0 <= int(needed.min()) <= int(needed.max()) < len(segment_rel):
            raise PromptError("a token points outside the table of segment relations")
        bucket = np.full(visible.shape, DIFFERENT_SAMPLE, np.int64)
        bucket[visible & same_sample] = segment_rel[needed]
        used = bucket[visible]
        if used.size and not 0 <= int(used.min()) <= int(used.max()) <= self._segment_buckets:
            raise PromptError(
                f"the request needs a segment bucket outside 1..{self._segment_buckets}, which is all that the "
                "model's bias table has; nest the dicts less deep"
            )
        distance = np.clip(keys[POSITION] - queries[POSITION], -self._reach, self._reach)
        inside = distances[distance + self._reach]
        rows = np.where(bucket == 0, inside, self._buckets + bucket - 1)
        return np.where(visible, rows, -1)
