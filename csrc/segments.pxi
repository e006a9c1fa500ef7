# A nested dict as a list of segments, and the buckets between them.
cdef enum:
    SEGMENT_LIMIT = 1024
    NESTING_LIMIT = 64
    DEPTH = 8
    NUM_BUCKETS = DEPTH * DEPTH + 1
if (SEGMENT_LIMIT, NESTING_LIMIT, DEPTH) != (MAX_SEGMENTS, MAX_NESTING, MAX_DEPTH):
    raise ImportError("csrc/prompt.pyx is compiled with other limits than cpmbee.encoding has; rebuild it")

# Buckets are nodes of a small graph: one more step up from a bucket, and the same way walked backwards.
cdef int32_t STEP_UP[NUM_BUCKETS]
cdef int32_t BACKWARDS[NUM_BUCKETS]


cdef inline int32_t bucket_of(int n_up, int n_down) noexcept nogil:
    cdef int32_t bucket = min(n_up, DEPTH - 1) * DEPTH + min(n_down, DEPTH - 1)
    return bucket + 1 if bucket else 0


cdef void fill_bucket_steps() noexcept:
    cdef int n_up, n_down
    for n_up in range(DEPTH):
        for n_down in range(DEPTH):
            STEP_UP[bucket_of(n_up, n_down)] = bucket_of(n_up + 1, n_down)
            BACKWARDS[bucket_of(n_up, n_down)] = bucket_of(n_down, n_up)


fill_bucket_steps()


cdef void fill_segment_rel(int32_t *table, const int32_t *parents, Py_ssize_t size) noexcept nogil:
    """Buckets between all segments; a segment sees what its parent sees from one step higher."""
    cdef Py_ssize_t i, j
    cdef const int32_t *above
    cdef int32_t *row
    for i in range(size):
        row = table + i * size
        row[i] = 0
        if i == 0:
            continue
        above = table + parents[i] * size
        for j in range(i):
            row[j] = STEP_UP[above[j]]
        for j in range(i):
            table[j * size + i] = BACKWARDS[row[j]]


cdef list items_of_dict(object value):
    """Keys and values in turn, as they are now: whatever changes the dict later, these stay. No more than can be used."""
    cdef list items = []
    cdef Py_ssize_t position = 0
    cdef PyObject *key
    cdef PyObject *child
    while len(items) < 2 * SEGMENT_LIMIT and PyDict_Next(value, &position, &key, &child):
        items.append(<object>key)  # no code of Python's runs in this loop
        items.append(<object>child)
    return items


cdef class _Sample:
    """The segments of one nested dict, in the order of their ids."""

    cdef str root  # how errors call it
    cdef list texts
    cdef object rng
    cdef Py_ssize_t size
    cdef int32_t parents[SEGMENT_LIMIT]
    cdef bint is_key[SEGMENT_LIMIT]
    cdef bint is_answer[SEGMENT_LIMIT]
    cdef bint has_answer_key

    def __cinit__(self, data, str root, rng):
        if not isinstance(data, dict):
            raise text_errors.not_a_dict(root, data)
        self.root, self.rng, self.texts = root, rng, []
        self.add("<root>", -1, True, False)
        self.walk(data, 0, 0, False)

    cdef Py_ssize_t add(self, str text, Py_ssize_t parent, bint is_key, bint is_answer) except -1:
        if self.size == SEGMENT_LIMIT:
            raise text_errors.too_many_segments(self.root, SEGMENT_LIMIT)
        self.texts.append(text)
        self.parents[self.size] = <int32_t>parent
        self.is_key[self.size] = is_key
        self.is_answer[self.size] = is_answer
        self.size += 1
        return self.size - 1

    cdef int walk(self, object value, Py_ssize_t parent, int depth, bint under_answer) except -1:
        cdef list items
        cdef Py_ssize_t i
        if type(value) is str:
            self.add(value, parent, False, under_answer)
        elif isinstance(value, str):
            self.add(exact_text(value), parent, False, under_answer)
        elif not isinstance(value, dict):
            raise text_errors.leaf_not_a_string(self.root, self.path(parent), value)
        elif depth == NESTING_LIMIT:
            raise text_errors.too_deep(self.root, self.path(parent), NESTING_LIMIT)
        else:
            items = items_of_dict(value) if type(value) is dict else self.items_of_subclass(value, parent)
            if self.rng is not None and under_answer:
                items = self.shuffled(items)
            for i in range(0, len(items), 2):
                self.walk_item(items[i], items[i + 1], parent, depth, under_answer)
        return 0

    cdef list items_of_subclass(self, object value, Py_ssize_t parent):
        """The same of a dict that may run code of its own."""
        cdef list items = []
        try:
            for item in islice(value.items(), SEGMENT_LIMIT):
                try:
                    key, child = item
                except (TypeError, ValueError):
                    raise text_errors.not_items(self.root, self.path(parent)) from None
                items += (key, child)
        except RuntimeError as error:
            if "during iteration" not in str(error):
                raise
            raise text_errors.dict_changed(self.root, self.path(parent), error) from None
        return items

    cdef list shuffled(self, list items):
        cdef list result = []
        cdef Py_ssize_t count = len(items) // 2, i
        for i in self.rng.permutation(count):
            if not 0 <= i < count:
                raise text_errors.not_a_generator(self.rng)
            result.append(items[2 * i])
            result.append(items[2 * i + 1])
        return result

    cdef int walk_item(self, object key, object child, Py_ssize_t parent, int depth, bint under_answer) except -1:
        if type(key) is not str:
            if not isinstance(key, str):
                raise text_errors.key_not_a_string(self.root, self.path(parent), key)
            key = exact_text(key)
        cdef Py_ssize_t segment = self.add(key, parent, True, False)
        if depth == 0 and <str>key == "<ans>":
            self.has_answer_key = under_answer = True
        return self.walk(child, segment, depth + 1, under_answer)

    cdef tuple path(self, Py_ssize_t segment):
        """The keys that lead to a segment, its own included where it is one."""
        cdef list keys = []
        while segment > 0:
            if self.is_key[segment]:
                keys.append(self.texts[segment])
            segment = self.parents[segment]
        return tuple(keys[::-1])
