# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, embedsignature=True
"""The prompt encoder on the trie; `cpmbee.plain.prompt` says what it computes."""

from itertools import islice

import numpy as np

from cpython.dict cimport PyDict_Next
from cpython.pycapsule cimport PyCapsule_GetPointer
from cpython.ref cimport PyObject
from libc.stdint cimport INT32_MAX, int32_t
from libc.stdlib cimport free, realloc
from libc.string cimport memcpy, memset

from cpmbee import text_errors
from cpmbee._tokenizer import Tokenizer
from cpmbee.encoding import MAX_DEPTH, MAX_NESTING, MAX_SEGMENTS, AnswerSlot, EncodedData, Prompt
from cpmbee.token_input import exact_previous, exact_text

# Of the class itself: what a subclass may call so need not be a trie of its own, nor one that stays.
trie_capsule_of = Tokenizer.trie_capsule.__get__

include "scan.pxi"
include "segments.pxi"


cdef int grow(int32_t **column, Py_ssize_t capacity) except -1:
    cdef int32_t *moved = <int32_t *>realloc(column[0], capacity * sizeof(int32_t))
    if moved is NULL:
        raise MemoryError("no memory for the tokens")
    column[0] = moved
    return 0


cdef class _Encoder:
    """Columns of tokens, growing sample by sample, and what has been given out to special and unknown tokens."""

    cdef object tokenizer
    cdef object trie_capsule  # keeps the trie
    cdef const Trie *trie
    cdef int32_t bos_id, eos_id, unk_id
    cdef Py_ssize_t vocab_size
    cdef dict pairs  # text -> (base id, subscript)
    cdef dict groups  # base id -> {ext id: subscript}
    cdef dict ext_table  # ext id -> text
    cdef int32_t *ids
    cdef int32_t *subs
    cdef int32_t *segments
    cdef Py_ssize_t count, capacity

    def __cinit__(self, tokenizer):
        if not isinstance(tokenizer, Tokenizer):
            raise text_errors.not_a_tokenizer(tokenizer)
        self.tokenizer = tokenizer
        self.trie_capsule = trie_capsule_of(tokenizer)
        if self.trie_capsule is None:
            raise text_errors.not_initialized("Tokenizer")
        self.trie = <const Trie *>PyCapsule_GetPointer(self.trie_capsule, TRIE_CAPSULE)
        self.bos_id, self.eos_id, self.unk_id = tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id
        self.vocab_size = tokenizer.vocab_size
        self.pairs, self.groups, self.ext_table = {}, {}, {}

    def __dealloc__(self):
        free(self.ids)
        free(self.subs)
        free(self.segments)

    cdef int go_on(self, previous) except -1:
        """Continue the tables of an earlier sample."""
        cdef dict groups, subs
        self.ext_table, groups = exact_previous(previous, self.vocab_size, self.tokenizer.token_to_id)
        for group, subs in groups.items():
            base = scan_group(self.trie, group)
            if base < 0:
                raise text_errors.not_previous(previous)
            self.groups[base] = subs
            for ext_id, sub in subs.items():
                self.pairs[self.ext_table[ext_id]] = (base, sub)
        return 0

    cdef int reserve(self, Py_ssize_t more) except -1:
        cdef Py_ssize_t capacity
        if self.count + more <= self.capacity:
            return 0
        capacity = self.count + more + self.capacity // 2
        grow(&self.ids, capacity)
        grow(&self.subs, capacity)
        grow(&self.segments, capacity)
        self.capacity = capacity
        return 0

    cdef int encode(self, _Sample sample, bint as_request) except -1:
        """Append a sample's tokens; of a request, answers only take the subscripts of their placeholders."""
        cdef Py_ssize_t segment, start, answers = 0
        cdef str text
        for segment in range(sample.size):
            start = self.count
            text = sample.texts[segment]
            if as_request and sample.is_answer[segment]:
                answers += 1
                text = f"<ans_{answers}>"
            self.reserve(PyUnicode_GET_LENGTH(text) + 2)
            self.ids[start] = self.bos_id
            self.subs[start] = 0
            self.count += 1
            self.encode_text(text, sample, segment)
            if sample.is_answer[segment]:
                if as_request:
                    self.count = start
            else:
                self.ids[self.count] = self.eos_id
                self.subs[self.count] = 0
                self.count += 1
            while start < self.count:
                self.segments[start] = <int32_t>segment
                start += 1
        if self.count > INT32_MAX:
            raise text_errors.too_long(sample.root)
        return 0

    cdef int encode_text(self, str text, _Sample sample, Py_ssize_t segment) except -1:
        cdef Scan scan
        cdef ScanEvent event
        cdef Py_ssize_t start
        scan_begin(&scan, self.trie, text)
        while True:
            start = self.count
            event = scan_tokens(&scan, self.ids, &self.count)
            memset(self.subs + start, 0, (self.count - start) * sizeof(int32_t))
            if event == SCAN_END:
                return 0
            if event == SCAN_UNCLOSED:
                where = text_errors.format_path(sample.root, sample.path(segment))
                raise text_errors.unclosed_special(scan.start, where)
            base, sub = self.subscript(scanned_piece(text, &scan, event))
            self.ids[self.count] = base
            self.subs[self.count] = sub
            self.count += 1

    cdef tuple subscript(self, str text):
        """The base id and the subscript of a special or unknown token, given out when it is first seen."""
        cdef tuple pair = self.pairs.get(text)
        cdef dict subs
        if pair is None:
            base = scan_group(self.trie, text)
            if base < 0:
                base = self.unk_id
            subs = self.groups.get(base)
            if subs is None:
                self.groups[base] = subs = {}
            pair = (base, len(subs))
            ext_id = self.vocab_size + len(self.ext_table)
            subs[ext_id] = pair[1]
            self.ext_table[ext_id] = text
            self.pairs[text] = pair
        return pair

    cdef dict ext_tokens(self):
        cdef dict tokens = {}
        for base, subs in self.groups.items():
            if base != self.tokenizer.ans_id:
                for ext_id, sub in subs.items():
                    tokens[(base, sub)] = self.ext_table[ext_id]
        return tokens


def encode_data(data, tokenizer, previous=None, rng=None):
    """Encode one sample with its answers, as training does.

    Args:
        data: nested dict of strings; it is not modified.
        tokenizer: gives the ids.
        previous: the sample whose ext ids and subscripts this one continues, such as the request of an example.
        rng: shuffles the keys below ``<ans>``; None keeps their order.

    Raises:
        PromptError: ``data`` is not a nested dict of strings, or exceeds a limit; names the path.
        TokenizeError: a text has an unclosed ``<``; names the path.
    """
    if rng is not None and not isinstance(rng, np.random.Generator):
        raise text_errors.not_a_generator(rng)
    cdef _Encoder encoder = _Encoder(tokenizer)
    if previous is not None:
        encoder.go_on(previous)
    cdef _Sample sample = _Sample(data, "$", rng)
    encoder.encode(sample, False)
    cdef Py_ssize_t count = encoder.count, i
    block = np.empty(3 * count + sample.size * sample.size, np.int32)
    context = np.empty(count, np.bool_)
    cdef int32_t[::1] memory = block
    cdef unsigned char[::1] flags = context.view(np.uint8)
    memcpy(&memory[0], encoder.ids, count * sizeof(int32_t))
    memcpy(&memory[count], encoder.subs, count * sizeof(int32_t))
    memcpy(&memory[2 * count], encoder.segments, count * sizeof(int32_t))
    fill_segment_rel(&memory[3 * count], sample.parents, sample.size)
    for i in range(count):
        flags[i] = not sample.is_answer[encoder.segments[i]]
    names = tokenizer.tokens
    return EncodedData(
        block[:count], block[count : 2 * count], block[2 * count : 3 * count], context, block[3 * count :],
        sample.size, encoder.ext_table, {names[base]: subs for base, subs in encoder.groups.items()},
    )


def encode_prompt(data, tokenizer, examples=()):
    """Encode a request for generation.

    Args:
        data: nested dict of strings with an ``<ans>`` key; the leaves under it are ignored. It is not modified.
        tokenizer: gives the ids.
        examples: in-context examples, dicts like ``data`` with their answers filled in.

    Raises:
        PromptError: there is nothing to answer, or ``data`` is not a nested dict of strings, or exceeds a limit;
            names the path.
        TokenizeError: a text has an unclosed ``<``; names the path.
    """
    cdef _Sample request = _Sample(data, "$", None)
    cdef _Encoder encoder = _Encoder(tokenizer)
    cdef tuple answers = _answers(request)
    encoder.encode(request, True)
    if type(examples) is tuple and not examples:
        return _prompt(encoder, [request], [encoder.count], answers)
    cdef list samples = [request], ends = [encoder.count]
    cdef _Sample sample
    try:
        given = iter(examples)
    except TypeError:
        raise text_errors.not_examples(examples) from None
    for i, example in enumerate(given):
        sample = _Sample(example, f"examples[{i}]", None)
        encoder.encode(sample, False)
        samples.append(sample)
        ends.append(encoder.count)
    return _prompt(encoder, samples, ends, answers)


cdef tuple _answers(_Sample request):
    cdef Py_ssize_t segment
    cdef list slots = []
    if not request.has_answer_key:
        raise text_errors.missing_answer("$")
    for segment in range(request.size):
        if request.is_answer[segment]:
            slots.append(AnswerSlot(request.path(segment)[1:], segment))
    if not slots:
        raise text_errors.no_answer_leaf("$")
    return tuple(slots)


cdef object _prompt(_Encoder encoder, list samples, list ends, tuple answers):
    cdef Py_ssize_t total = encoder.count, rel_size = 0, index = 0, offset = 0, end, i
    cdef _Sample sample
    for sample in samples:
        rel_size += sample.size * sample.size
    if rel_size > INT32_MAX:
        raise text_errors.too_long("$")
    block = np.empty(7 * total + rel_size, np.int32)
    cdef int32_t[::1] memory = block
    cdef int32_t *columns = &memory[0]
    memcpy(columns, encoder.ids, total * sizeof(int32_t))
    memcpy(columns + total, encoder.subs, total * sizeof(int32_t))
    memcpy(columns + 2 * total, encoder.segments, total * sizeof(int32_t))
    i = 0
    for sample in samples:
        end = ends[index]
        while i < end:
            columns[3 * total + i] = <int32_t>index
            columns[4 * total + i] = <int32_t>i
            columns[5 * total + i] = <int32_t>sample.size
            columns[6 * total + i] = <int32_t>offset
            i += 1
        fill_segment_rel(columns + 7 * total + offset, sample.parents, sample.size)
        offset += sample.size * sample.size
        index += 1
    return Prompt(
        block[:total], block[total : 2 * total], block[2 * total : 3 * total], block[3 * total : 4 * total],
        block[4 * total : 5 * total], block[5 * total : 6 * total], block[6 * total : 7 * total],
        np.ones(total, np.bool_), block[7 * total :], answers, encoder.ext_tokens(), len(samples),
    )
