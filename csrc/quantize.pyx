# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Weights to few bits, in the order of the file; the readable specification is `cpmbee.export.plain_quantize`."""

import numpy as np

from libc.stdint cimport uint8_t, uint16_t


cdef extern from "quantize_kernels.h" nogil:
    void cpmbee_widen(const uint16_t *half, long n, float factor, float *out)
    int cpmbee_quantize(
        const float *rows, const float *importance, long groups, long columns, int block, int bits,
        const float *levels, int num_levels, int refine, uint8_t *numbers, uint8_t *packed, uint16_t *scales,
        double *sums,
    )
    void cpmbee_expand(
        const uint8_t *packed, const uint16_t *scales, long vectors, long blocks, int bits, long rows, long columns,
        float *out,
    )


def quantize(
    const float[:, ::1] rows not None,
    const float[::1] importance not None,
    int bits,
    int block_size,
    const float[::1] levels not None,
    bint refine,
):
    """See `cpmbee.export.plain_quantize.quantize`."""
    cdef long groups = rows.shape[0] // 16, columns = rows.shape[1]
    cdef int status
    if bits not in (4, 8) or block_size not in (32, 64, 128):
        raise ValueError("quantize: no such format")
    if rows.shape[0] < 1 or columns < 1 or rows.shape[0] % 16 or columns % block_size:
        raise ValueError("quantize: the rows are not padded")
    if importance.shape[0] != columns or levels.shape[0] < 1:
        raise ValueError("quantize: sizes do not fit together")
    packed = np.empty((groups, columns * bits // 32, 16, 4), np.uint8)
    scales = np.empty((groups, columns // block_size, 16), np.uint16)
    cdef uint8_t[:, :, :, ::1] packed_view = packed
    cdef uint16_t[:, :, ::1] scales_view = scales
    cdef uint8_t[::1] numbers = np.empty(16 * columns, np.uint8)
    cdef double[2] sums
    sums[0] = 0
    sums[1] = 0
    with nogil:
        status = cpmbee_quantize(
            &rows[0, 0], &importance[0], groups, columns, block_size, bits, &levels[0], <int>levels.shape[0], refine,
            &numbers[0], &packed_view[0, 0, 0, 0], &scales_view[0, 0, 0], sums,
        )
    if status:
        raise OverflowError("has values that quantized weights with fp16 scales cannot hold")
    return packed, scales.view(np.float16), sums[0], sums[1]


def widen(const uint16_t[:, ::1] half not None, float factor, float[:, :] out not None):
    """See `cpmbee.export.plain_quantize.widen`."""
    cdef Py_ssize_t row
    if out.shape[0] != half.shape[0] or out.shape[1] != half.shape[1]:
        raise ValueError("widen: sizes do not fit together")
    if half.shape[1] == 0:
        return
    if out.strides[1] != sizeof(float):
        raise ValueError("widen: rows must be contiguous")
    with nogil:
        for row in range(half.shape[0]):
            cpmbee_widen(&half[row, 0], half.shape[1], factor, &out[row, 0])


def expand(
    const uint8_t[:, :, :, ::1] packed not None,
    const uint16_t[:, :, ::1] scales not None,
    int bits,
    float[:, ::1] out not None,
):
    """See `cpmbee.export.plain_quantize.expand`."""
    cdef long vectors = packed.shape[1], blocks = scales.shape[1], rows = out.shape[0], columns = out.shape[1]
    if packed.shape[2] != 16 or packed.shape[3] != 4 or scales.shape[2] != 16 or bits not in (4, 8):
        raise ValueError("expand: no such format")
    if scales.shape[0] != packed.shape[0] or vectors * 32 // bits not in (32 * blocks, 64 * blocks, 128 * blocks):
        raise ValueError("expand: numbers and scales do not fit together")
    if rows > 16 * packed.shape[0] or columns > vectors * 32 // bits:
        raise ValueError("expand: more is wanted than is stored")
    if rows < 1 or columns < 1:
        return
    with nogil:
        cpmbee_expand(
            &packed[0, 0, 0, 0], &scales[0, 0, 0], vectors, blocks, bits, rows, columns, &out[0, 0]
        )
