# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The relation builder on runs of tokens; `cpmbee.plain.relation` says what it computes.

Neighbouring tokens of one segment, with consecutive positions, form a run. For a query, all keys of a run have the same
relation, or consecutive entries of the table of distances, so a row is written run by run.
"""

import numpy as np

cimport cython
from cpython.long cimport PyLong_AsLongLongAndOverflow
from libc.stdint cimport INT32_MAX, int16_t, int32_t, int64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy

from cpmbee.columns import int32_array, int32_number, packed_columns, prompt_columns
from cpmbee.config import ModelConfig
from cpmbee.distance import signed_distance_buckets
from cpmbee.errors import ConfigError, PromptError

NO_RELATIONS = np.empty(0, np.int32)

include "layout.pxi"


cdef inline void fill_constant(int16_t *out, Py_ssize_t count, int16_t value) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(count):
        out[i] = value


@cython.no_gc_clear  # the table of distances stays as long as the object
cdef class RelationBuilder:
    """Writes the relation matrix: for each query and key the row of the bias table, or -1 for "may not look".

    Args:
        config: its number of buckets and the greatest distance.

    Raises:
        ConfigError: ``config`` is no `ModelConfig`.
    """

    cdef object config  # None until __init__ has succeeded
    cdef int num_buckets, segment_buckets
    cdef int64_t reach
    cdef const int16_t[::1] distances

    def __init__(self, config):
        if not isinstance(config, ModelConfig):
            raise ConfigError(f"expected a ModelConfig, not {type(config).__name__}")
        cdef const int16_t[::1] distances = signed_distance_buckets(config)
        cdef int num_buckets = config.position_bias_num_buckets
        cdef int segment_buckets = config.position_bias_num_segment_buckets
        # Together, with no Python code in between: another thread may be filling.
        self.config, self.num_buckets, self.segment_buckets = config, num_buckets, segment_buckets
        self.distances, self.reach = distances, distances.shape[0] // 2

    def fill(self, out, layout, q_start=0):
        """Write the rows of the queries from ``q_start`` to the layout's end.

        Args:
            out: int16[Q, W], Q queries, W >= T keys; what lies past key T becomes -1.
            layout: the T tokens.
            q_start: index of the first query.

        Raises:
            PromptError: a segment bucket has no row in the bias table, or ``q_start`` or ``layout`` is something else.
            ValueError: ``out`` has another type or shape, or its rows overlap.
        """
        cdef int16_t[:, :] cells
        if self.config is None:
            raise ConfigError("this RelationBuilder has no configuration: its __init__ was not called, or failed")
        if not isinstance(layout, TokenLayout):
            raise PromptError(f"expected a TokenLayout, not {type(layout).__name__}")
        cdef TokenLayout tokens = layout
        cdef Py_ssize_t start = to_int32("q_start", q_start)
        try:
            cells = out
        except (BufferError, TypeError, ValueError):
            raise ValueError("out must be an int16 matrix") from None
        cdef Py_ssize_t queries = tokens.length - start, size = sizeof(int16_t)
        if not 0 <= start <= tokens.length or cells.shape[0] != queries or cells.shape[1] < tokens.length:
            raise ValueError(
                f"out has shape ({cells.shape[0]}, {cells.shape[1]}); {queries} queries and {tokens.length} keys do "
                "not fit it"
            )
        if queries == 0:
            return
        if cells.shape[1] > 1 and cells.strides[1] != size or (cells.strides[0] | <Py_ssize_t>&cells[0, 0]) % size:
            raise ValueError("the rows of out must be contiguous")
        if queries > 1 and abs(cells.strides[0]) < cells.shape[1] * size:
            raise ValueError("the rows of out must not overlap")
        self.fill_rows(&cells[0, 0], cells.strides[0] // size, cells.shape[1], tokens, start)

    cdef int fill_rows(
        self, int16_t *out, Py_ssize_t stride, Py_ssize_t width, TokenLayout layout, Py_ssize_t q_start
    ) except -1:
        cdef Py_ssize_t run = 0, query, moving, num_moving, i
        cdef bint first = True
        cdef const Run *of_query
        cdef Py_ssize_t *runs = <Py_ssize_t *>malloc(layout.num_runs * sizeof(Py_ssize_t))
        if runs is NULL:
            raise MemoryError("no memory for the relation matrix")
        try:
            while layout.run_end(run) <= q_start:
                run += 1
            for query in range(q_start, layout.length):
                if query == layout.run_end(run):
                    run, first = run + 1, True
                of_query = &layout.runs[run]
                if first:  # of its run: all keys
                    num_moving = 0
                    for i in range(layout.num_runs):
                        if self.fill_run(out, layout, i, of_query, query):
                            runs[num_moving] = i
                            num_moving += 1
                    fill_constant(out + layout.length, width - layout.length, -1)
                    first = False
                else:  # like the query before, but for keys of its own segment and for answers
                    memcpy(out, out - stride, width * sizeof(int16_t))
                    for moving in range(num_moving):
                        self.fill_run(out, layout, runs[moving], of_query, query)
                out += stride
        finally:
            free(runs)
        return 0

    cdef int fill_run(
        self, int16_t *out, TokenLayout layout, Py_ssize_t run, const Run *of_query, Py_ssize_t query
    ) except -1:
        """Write the keys of one run; 1 where the next query of the same run would get something else."""
        cdef const Token *key = &layout.runs[run].first
        cdef const Token *asking = &of_query.first
        cdef Py_ssize_t start = layout.runs[run].start, end = layout.run_end(run), seen = end
        cdef int64_t index
        cdef int32_t bucket = 1
        cdef bint same_sample = asking.sample == key.sample and asking.span == key.span
        if asking.span != key.span or not (asking.sample == 0 or same_sample) or (asking.context and not key.context):
            fill_constant(out + start, end - start, -1)
            return 0
        if not key.context:  # an answer: up to the query itself
            seen = min(end, max(start, query + 1))
            fill_constant(out + seen, end - seen, -1)
        if seen == start:
            return 1
        if same_sample:
            index = <int64_t>asking.segment * asking.num_segments + key.segment + asking.rel_offset
            if not 0 <= index < layout.rel.shape[0]:
                raise PromptError("a token points outside the table of segment relations")
            bucket = layout.rel[index]
        if not 0 <= bucket <= self.segment_buckets:
            raise PromptError(
                f"the request needs a segment bucket outside 1..{self.segment_buckets}, which is all that the "
                "model's bias table has; nest the dicts less deep"
            )
        if bucket:
            fill_constant(out + start, seen - start, <int16_t>(self.num_buckets + bucket - 1))
            return not key.context
        self.fill_distances(
            out + start, seen - start,
            <int64_t>key.position - asking.position - (query - of_query.start),
        )
        return 1

    cdef void fill_distances(self, int16_t *out, Py_ssize_t count, int64_t distance) noexcept nogil:
        """Buckets of ``count`` distances, each one more than the last."""
        cdef Py_ssize_t before = <Py_ssize_t>min(<int64_t>count, max(<int64_t>0, -self.reach - distance))
        cdef Py_ssize_t inside
        fill_constant(out, before, self.distances[0])
        distance += before
        inside = <Py_ssize_t>min(<int64_t>count - before, max(<int64_t>0, self.reach + 1 - distance))
        if inside:
            memcpy(out + before, &self.distances[distance + self.reach], inside * sizeof(int16_t))
        fill_constant(out + before + inside, count - before - inside, self.distances[2 * self.reach])

    def packed(
        self, context, sample_ids, num_segments, segment_ids, segment_rel_offset, segment_rel, spans, length
    ):
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
        cdef Py_ssize_t tokens
        rows = packed_columns(
            context, sample_ids, num_segments, segment_ids, segment_rel_offset, segment_rel, spans, length
        )
        batch, width = np.shape(context)
        out = np.full((batch, width, width), -1, np.int16)
        for matrix, (columns, rel) in zip(out, rows):
            tokens = columns.shape[1]
            self.fill(matrix[:tokens], TokenLayout(columns, rel))
        return out

    def __reduce__(self):
        return type(self), (self.config,)
