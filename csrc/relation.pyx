# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The relation builder on runs of tokens; `cpmbee.plain.relation` says what it computes.

Neighbouring tokens of one segment, with consecutive positions, form a run. For a query, all keys of a run have the same
relation, or consecutive entries of the table of distances, so a row is written run by run.
"""

import numpy as np

from libc.stdint cimport INT32_MAX, INT32_MIN, int16_t, int32_t, int64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy

from cpmbee.columns import packed_columns, prompt_columns
from cpmbee.distance import signed_distance_buckets
from cpmbee.errors import PromptError

cdef enum:
    SEGMENT, SAMPLE, POSITION, CONTEXT, SPAN, NUM_SEGMENTS, REL_OFFSET, NUM_COLUMNS

cdef struct Token:
    int32_t segment, sample, position, context, span, num_segments, rel_offset

cdef struct Run:
    Token first
    Py_ssize_t start


cdef inline bint continues(const Run *run, const Token *token, Py_ssize_t index) noexcept nogil:
    return (
        token.segment == run.first.segment and token.sample == run.first.sample
        and token.context == run.first.context and token.span == run.first.span
        and token.num_segments == run.first.num_segments and token.rel_offset == run.first.rel_offset
        and <int64_t>token.position - run.first.position == index - run.start
    )


cdef class TokenLayout:
    """What the relation matrix needs to know about a sequence of tokens; grows as tokens are generated.

    The order of tokens is the causal order: an answer token sees answer tokens up to itself.

    Args:
        columns: int32[7, T]; rows are segment id, sample id, position, context (0 or 1), span, number of segments of
            the sample, and where the sample starts in ``segment_rel``.
        segment_rel: int32[R], tables of segment buckets. It is not copied and must not change.
        reserve: tokens that can be appended before memory moves.

    Raises:
        PromptError: a column points outside ``segment_rel``.
    """

    cdef Run *runs
    cdef Py_ssize_t num_runs, capacity
    cdef readonly Py_ssize_t length
    cdef readonly object segment_rel
    cdef const int32_t[::1] rel

    def __init__(self, columns, segment_rel, reserve=0):
        given = np.ascontiguousarray(columns, np.int32)
        if given.ndim != 2 or given.shape[0] != NUM_COLUMNS:
            raise PromptError(f"token columns must have shape ({NUM_COLUMNS}, T), not {given.shape}")
        self.set_rel(segment_rel)
        self.set_tokens(given)

    cdef int set_rel(self, segment_rel) except -1:
        self.segment_rel = np.ascontiguousarray(segment_rel, np.int32)
        if self.segment_rel.ndim != 1:
            raise PromptError("segment_rel must have one dimension")
        self.rel = self.segment_rel
        return 0

    cdef int set_tokens(self, const int32_t[:, ::1] given) except -1:
        cdef Py_ssize_t i
        cdef Token token
        self.length = self.num_runs = 0
        for i in range(given.shape[1]):
            token.segment = given[SEGMENT, i]
            token.sample = given[SAMPLE, i]
            token.position = given[POSITION, i]
            token.context = given[CONTEXT, i] != 0
            token.span = given[SPAN, i]
            token.num_segments = given[NUM_SEGMENTS, i]
            token.rel_offset = given[REL_OFFSET, i]
            self.add(&token)
        return 0

    cdef int add(self, const Token *token) except -1:
        cdef Run *moved
        cdef Py_ssize_t capacity
        if self.num_runs and continues(&self.runs[self.num_runs - 1], token, self.length):
            self.length += 1
            return 0
        if not (
            0 <= token.segment < token.num_segments and 0 <= token.rel_offset
            and token.rel_offset + <int64_t>token.num_segments * token.num_segments <= self.rel.shape[0]
        ):
            raise PromptError(f"token {self.length} points outside the table of segment relations")
        if self.num_runs == self.capacity:
            capacity = 16 + self.capacity + self.capacity // 2
            moved = <Run *>realloc(self.runs, capacity * sizeof(Run))
            if moved is NULL:
                raise MemoryError("no memory for the token layout")
            self.runs, self.capacity = moved, capacity
        self.runs[self.num_runs].first = token[0]
        self.runs[self.num_runs].start = self.length
        self.num_runs += 1
        self.length += 1
        return 0

    def __dealloc__(self):
        free(self.runs)

    @classmethod
    def from_prompt(cls, prompt, reserve=0):
        """The layout of an encoded request, with room for ``reserve`` answer tokens."""
        return cls(prompt_columns(prompt), prompt.segment_rel, reserve)

    cdef inline Py_ssize_t run_end(self, Py_ssize_t run) noexcept nogil:
        return self.runs[run + 1].start if run + 1 < self.num_runs else self.length

    @property
    def columns(self):
        """int32[7, T], read-only: the tokens' columns as they are now."""
        result = np.empty((NUM_COLUMNS, self.length), np.int32)
        cdef int32_t[:, ::1] cells = result
        cdef Py_ssize_t run, i
        cdef const Token *first
        for run in range(self.num_runs):
            first = &self.runs[run].first
            for i in range(self.runs[run].start, self.run_end(run)):
                cells[SEGMENT, i] = first.segment
                cells[SAMPLE, i] = first.sample
                cells[POSITION, i] = first.position + <int32_t>(i - self.runs[run].start)
                cells[CONTEXT, i] = first.context
                cells[SPAN, i] = first.span
                cells[NUM_SEGMENTS, i] = first.num_segments
                cells[REL_OFFSET, i] = first.rel_offset
        result.flags.writeable = False
        return result

    def append(self, segment_id, position, context=False, sample_id=0, span=0):
        """Add one token to a sample that the layout already has.

        Raises:
            PromptError: the sample, or the segment in it, does not exist.
        """
        cdef Token token
        cdef Py_ssize_t run = self.num_runs - 1
        cdef int32_t sample = sample_id, row = span
        while run >= 0 and (self.runs[run].first.sample != sample or self.runs[run].first.span != row):
            run -= 1
        if run < 0:
            raise PromptError(f"cannot append to sample {sample_id} of span {span}: it has no tokens")
        token = self.runs[run].first
        if not 0 <= segment_id < token.num_segments:
            raise PromptError(f"cannot append to segment {segment_id}: the sample has {token.num_segments}")
        if not -INT32_MAX <= position <= INT32_MAX:
            raise PromptError(f"position {position} does not fit 32 bits")
        token.segment, token.position, token.context = segment_id, position, bool(context)
        self.add(&token)

    def truncate(self, Py_ssize_t length):
        """Forget the tokens from index ``length`` on.

        Raises:
            PromptError: the layout has fewer.
        """
        if not 0 <= length <= self.length:
            raise PromptError(f"cannot truncate a layout of {self.length} tokens to {length}")
        while self.num_runs and self.runs[self.num_runs - 1].start >= length:
            self.num_runs -= 1
        self.length = length

    def take(self, indices, reserve=0):
        """A layout of the tokens at ``indices``, in that order: a part, or examples before the request.

        Raises:
            PromptError: an index is out of range.
        """
        chosen = np.asarray(indices, np.int64)
        if chosen.ndim != 1 or (chosen.size and not 0 <= chosen.min() <= chosen.max() < self.length):
            raise PromptError(f"indices must be a list of numbers from 0 to {self.length - 1}")
        return type(self)(self.columns[:, chosen], self.segment_rel, reserve)

    def copy(self, reserve=0):
        """An independent layout of the same tokens."""
        cdef TokenLayout other = TokenLayout.__new__(TokenLayout)
        other.segment_rel, other.rel = self.segment_rel, self.rel
        other.runs = <Run *>malloc(max(self.num_runs, 1) * sizeof(Run))
        if other.runs is NULL:
            raise MemoryError("no memory for the token layout")
        memcpy(other.runs, self.runs, self.num_runs * sizeof(Run))
        other.num_runs, other.capacity, other.length = self.num_runs, max(self.num_runs, 1), self.length
        return other

    def __len__(self):
        return self.length


cdef inline void fill_constant(int16_t *out, Py_ssize_t count, int16_t value) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(count):
        out[i] = value


cdef class RelationBuilder:
    """Writes the relation matrix: for each query and key the row of the bias table, or -1 for "may not look".

    Args:
        config: its number of buckets and the greatest distance.
    """

    cdef int num_buckets, segment_buckets
    cdef int64_t reach
    cdef object table
    cdef const int16_t[::1] distances

    def __init__(self, config):
        self.num_buckets = config.position_bias_num_buckets
        self.segment_buckets = config.position_bias_num_segment_buckets
        self.reach = config.position_bias_max_distance
        self.table = signed_distance_buckets(config)
        self.distances = self.table

    def fill(self, out, TokenLayout layout not None, Py_ssize_t q_start=0):
        """Write the rows of the queries from ``q_start`` to the layout's end.

        Args:
            out: int16[Q, W], Q queries, W >= T keys; what lies past key T becomes -1.
            layout: the T tokens.
            q_start: index of the first query.

        Raises:
            PromptError: a segment bucket has no row in the bias table.
            ValueError: ``out`` has another type or shape.
        """
        cdef int16_t[:, :] cells
        try:
            cells = out
        except (TypeError, ValueError):
            raise ValueError("out must be an int16 matrix") from None
        cdef Py_ssize_t queries = layout.length - q_start
        if not 0 <= q_start <= layout.length or cells.shape[0] != queries or cells.shape[1] < layout.length:
            raise ValueError(
                f"out has shape {out.shape}; {queries} queries and {layout.length} keys do not fit it"
            )
        if cells.shape[1] > 1 and cells.strides[1] != sizeof(int16_t) or cells.strides[0] % sizeof(int16_t):
            raise ValueError("the rows of out must be contiguous")
        if queries:
            self.fill_rows(&cells[0, 0], cells.strides[0] // <Py_ssize_t>sizeof(int16_t), cells.shape[1], layout, q_start)

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
        batch, width = np.shape(context)
        out = np.full((batch, width, width), -1, np.int16)
        rows = packed_columns(
            context, sample_ids, num_segments, segment_ids, segment_rel_offset, segment_rel, spans, length
        )
        for matrix, (columns, rel) in zip(out, rows):
            tokens = columns.shape[1]
            self.fill(matrix[:tokens], TokenLayout(columns, rel))
        return out
