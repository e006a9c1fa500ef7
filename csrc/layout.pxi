# Tokens as runs: neighbours of one segment, with consecutive positions, share one entry.
cdef enum:  # as in cpmbee.columns
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


cdef inline int32_t to_int32(str name, object value) except? -1:
    cdef int overflow = 0
    cdef long long number
    if type(value) is not int:
        value = int32_number(name, value)
    number = PyLong_AsLongLongAndOverflow(value, &overflow)
    if overflow or not -INT32_MAX <= number <= INT32_MAX:
        number = int32_number(name, value)  # raises
    return <int32_t>number


@cython.no_gc  # it holds nothing that could hold it
cdef class TokenLayout:
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

    cdef Run *runs
    cdef Py_ssize_t num_runs, capacity
    cdef readonly Py_ssize_t length
    cdef readonly object segment_rel
    cdef const int32_t[::1] rel  # has no entries where __init__ was not called

    def __cinit__(self):
        self.segment_rel = NO_RELATIONS

    def __init__(self, columns, segment_rel, reserve=0):
        self.length = self.num_runs = 0
        given, table = int32_array("token columns", columns), int32_array("segment_rel", segment_rel)
        if given.ndim != 2 or given.shape[0] != NUM_COLUMNS:
            raise PromptError(f"token columns must have shape ({NUM_COLUMNS}, T), not {given.shape}")
        if table.ndim != 1:
            raise PromptError("segment_rel must have one dimension")
        self.set_tokens(np.ascontiguousarray(given), np.ascontiguousarray(table))

    cdef int set_tokens(self, const int32_t[:, ::1] given, table) except -1:
        cdef Py_ssize_t i
        cdef Token token
        cdef const int32_t[::1] rel = table
        self.length = self.num_runs = 0  # code that ran since may have added some, which belong to another table
        self.segment_rel, self.rel = table, rel
        for i in range(given.shape[1]):
            token.segment = given[SEGMENT, i]
            token.sample = given[SAMPLE, i]
            token.position = given[POSITION, i]
            token.context = given[CONTEXT, i] != 0
            token.span = given[SPAN, i]
            token.num_segments = given[NUM_SEGMENTS, i]
            token.rel_offset = given[REL_OFFSET, i]
            try:
                self.add(&token)
            except:
                self.length = self.num_runs = 0
                raise
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
        if cells.shape[1] != self.length:  # making an array may let other code run
            raise PromptError("the token layout changed while it was read")
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
            PromptError: the sample, or the segment in it, does not exist, or a number is none of 32 bits.
        """
        cdef int32_t segment = to_int32("segment_id", segment_id), place = to_int32("position", position)
        cdef int32_t sample = to_int32("sample_id", sample_id), row = to_int32("span", span)
        cdef bint seen_by_all = bool(context)
        cdef Token token
        cdef Py_ssize_t run = self.num_runs - 1
        while run >= 0 and (self.runs[run].first.sample != sample or self.runs[run].first.span != row):
            run -= 1
        if run < 0:
            raise PromptError(f"cannot append to sample {sample} of span {row}: it has no tokens")
        token = self.runs[run].first
        if not 0 <= segment < token.num_segments:
            raise PromptError(f"cannot append to segment {segment}: the sample has {token.num_segments}")
        token.segment, token.position, token.context = segment, place, seen_by_all
        self.add(&token)

    def truncate(self, length):
        """Forget the tokens from index ``length`` on.

        Raises:
            PromptError: the layout has fewer.
        """
        cdef Py_ssize_t kept = to_int32("length", length)
        if not 0 <= kept <= self.length:
            raise PromptError(f"cannot truncate a layout of {self.length} tokens to {kept}")
        while self.num_runs and self.runs[self.num_runs - 1].start >= kept:
            self.num_runs -= 1
        self.length = kept

    def take(self, indices, reserve=0):
        """A layout of the tokens at ``indices``, in that order: a part, or examples before the request.

        Raises:
            PromptError: an index is out of range.
        """
        chosen = int32_array("indices", indices)
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
        if self.num_runs:  # else there may be no memory to copy from
            memcpy(other.runs, self.runs, self.num_runs * sizeof(Run))
        other.num_runs, other.capacity, other.length = self.num_runs, max(self.num_runs, 1), self.length
        return other

    def __len__(self):
        return self.length

    def __reduce__(self):
        return type(self), (self.columns, self.segment_rel)
