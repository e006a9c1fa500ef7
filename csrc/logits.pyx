# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Pick tokens from a row of logits; the readable specification is `cpmbee.plain.logits`."""

from libc.math cimport INFINITY, log
from libc.stdint cimport int32_t
from libc.stdlib cimport calloc, free


cdef extern from "logits_kernels.h" nogil:
    void cpmbee_top_k(const float *x, long n, int32_t first_id, float *values, int32_t *ids, int k)
    double cpmbee_sum_exp(const float *x, long n, float max)


def select(
    float[::1] row not None,
    Py_ssize_t vocab_size,
    Py_ssize_t ext_begin,
    Py_ssize_t ext_end,
    const int32_t[::1] penalized not None,
    float penalty,
    Py_ssize_t forbidden,
    float[::1] values not None,
    int32_t[::1] ids not None,
):
    """See `cpmbee.plain.logits.select`."""
    cdef Py_ssize_t i
    cdef int k = <int>values.shape[0]
    cdef double total
    cdef bint good = True
    if not 0 < vocab_size <= ext_begin <= ext_end <= row.shape[0] or k < 1 or ids.shape[0] != values.shape[0]:
        raise ValueError("logits: sizes do not fit together")
    if not 0 < penalty < INFINITY:
        raise ValueError("logits: the penalty must be a positive number")
    if not -1 <= forbidden < vocab_size:
        raise ValueError("logits: forbidden token outside the vocabulary")
    if values.shape[0] > vocab_size + ext_end - ext_begin:
        raise ValueError("logits: more tokens wanted than there are")
    with nogil:
        if forbidden >= 0:
            row[forbidden] = -10000.0
        if penalty != 1.0 and penalized.shape[0]:
            good = _penalize(row, vocab_size, penalized, penalty)
        for i in range(k):
            values[i] = -INFINITY
            ids[i] = -1
        cpmbee_top_k(&row[0], vocab_size, 0, &values[0], &ids[0], k)
        if ext_end > ext_begin:
            cpmbee_top_k(&row[ext_begin], ext_end - ext_begin, <int32_t>vocab_size, &values[0], &ids[0], k)
        total = cpmbee_sum_exp(&row[0], vocab_size, values[0])
        if ext_end > ext_begin:
            total += cpmbee_sum_exp(&row[ext_begin], ext_end - ext_begin, values[0])
    if not good:
        raise MemoryError("no memory for the penalty")
    return values[0] + log(total)


cdef bint _penalize(
    float[::1] row, Py_ssize_t vocab_size, const int32_t[::1] tokens, float penalty
) noexcept nogil:
    """Divide positive logits, multiply negative ones; a token that is listed twice is penalized once. False: no memory."""
    cdef Py_ssize_t i
    cdef int32_t token
    cdef unsigned char bit
    cdef unsigned char *seen = <unsigned char *>calloc(vocab_size // 8 + 1, 1)  # one bit a token
    if seen is NULL:
        return False
    for i in range(tokens.shape[0]):
        token = tokens[i]
        if token < 0 or token >= vocab_size:
            continue
        bit = 1 << (token & 7)
        if seen[token >> 3] & bit:
            continue
        seen[token >> 3] |= bit
        row[token] = row[token] * penalty if row[token] < 0 else row[token] / penalty
    free(seen)
    return True
