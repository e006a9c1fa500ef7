"""Weights to few bits, in NumPy: the specification of ``cpmbee._quantize``, which gives the same bytes faster."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpmbee.export.packing import LANES, BlockFormat, Float16, Float32, Uint8, as_half, dequantize, pack


class Quantized(NamedTuple):
    """Rows of a matrix as the file stores them.

    Attributes:
        packed: bytes, (rows / 16, columns / p, 16, 4).
        scales: (rows / 16, blocks, 16).
        error: importance-weighted sum of squared errors.
        power: importance-weighted sum of squared weights.
    """

    packed: Uint8
    scales: Float16
    error: float
    power: float


def quantize(
    rows: Float32, importance: Float32, bits: int, block_size: int, levels: Float32, refine: bool
) -> Quantized:
    """Quantize some rows of a matrix.

    Each block tries scales that map its extreme (the value of the largest magnitude) to each of ``levels``: a positive
    level stands for the positive scale that reaches it with either sign, a negative one for the scale, of either sign,
    that gives the extreme this very number. With ``refine`` the rounded numbers of each try get their least-squares
    scale, too. The scale with the least weighted error wins; the block is then rounded with it once more.

    Args:
        rows: fp32, outputs padded to a multiple of 16, inputs to a multiple of the block.
        importance: (columns,) weight of each input in the error.
        bits: 4 or 8.
        block_size: inputs that share a scale.
        levels: the candidates.
        refine: fit scales to rounded numbers.

    Raises:
        OverflowError: a scale would be beyond fp16.
    """
    layout = BlockFormat(bits, block_size)
    zero_point = np.float32(layout.zero_point)
    w = rows.reshape(len(rows), -1, block_size)  # (rows, blocks, block)
    h = np.broadcast_to(importance.reshape(-1, block_size), w.shape)
    extreme = _extreme(w)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        scales = _search(w, h, extreme, zero_point, levels, refine)
        if ((scales == 0) & (abs(extreme) > 1)).any():
            raise OverflowError("has values that quantized weights with fp16 scales cannot hold")
        wide = scales.astype(np.float32)
        inverse = np.where(wide == 0, np.float32(0), np.float32(1) / wide)
    q = _rounded(w * inverse[..., None], zero_point)
    left = w - q * wide[..., None]
    error = _fold(_lane_sums(h * left * left)).sum(dtype=np.float64)
    power = _fold(_lane_sums(h * w * w)).sum(dtype=np.float64)
    packed = pack((q + zero_point).astype(np.uint8).reshape(rows.shape), layout)
    by_lane = np.ascontiguousarray(scales.reshape(-1, LANES, scales.shape[1]).transpose(0, 2, 1))
    return Quantized(packed, by_lane, float(error), float(power))


def widen(half: NDArray[np.uint16], factor: float, out: Float32) -> None:
    """Write finite fp16 numbers, given by their bits, times ``factor`` to ``out``; the product is taken in fp32."""
    np.multiply(half.view(np.float16), np.float32(factor), out=out, dtype=np.float32)


def expand(packed: Uint8, scales: NDArray[np.uint16], bits: int, out: Float32) -> None:
    """Write what stored numbers mean to ``out``, fp32 (outputs, inputs), which may leave out the padding.

    Args:
        packed: bytes of whole groups of outputs, (groups, inputs / p, 16, 4).
        scales: bits of their fp16 scales, (groups, blocks, 16).
        bits: 4 or 8.
        out: receives the values.
    """
    layout = BlockFormat(bits, packed.shape[1] * 32 // bits // scales.shape[1])
    rows, columns = out.shape
    out[:] = dequantize(packed, scales.view(np.float16), rows, columns, layout)


def _search(w: Float32, h: Float32, extreme: Float32, zero_point: np.float32, levels: Float32, refine: bool) -> Float16:
    """The best scale of each block, (rows, blocks); 0 where none is a finite fp16 number other than 0."""
    best = np.zeros(extreme.shape, np.float16)
    least = np.full(extreme.shape, np.inf, np.float32)
    one, two = np.float32(1), np.float32(2)

    def offer(candidate: Float16, error: Float32, valid: NDArray[np.bool_]) -> None:
        better = valid & np.isfinite(candidate) & (candidate != 0) & (error < least)
        best[better] = candidate[better]
        least[better] = error[better]

    for level in levels:
        candidate = as_half((abs(extreme) if level > 0 else extreme) / level)
        valid = np.isfinite(candidate) & (candidate != 0)
        scale = candidate.astype(np.float32)
        exact = w * (one / scale)[..., None]
        q = _rounded(exact, zero_point)
        d = exact - q
        if len(levels) == 1 and not refine:
            offer(candidate, np.zeros_like(least), valid)
            break
        left, cross, whole = (_fold(_lane_sums(h * a * b)) for a, b in ((d, d), (d, q), (q, q)))
        square = scale * scale
        offer(candidate, square * left, valid)
        if refine:
            fitted = as_half(scale * (one + cross / whole))
            change = fitted.astype(np.float32) / scale - one
            offer(fitted, square * (left - two * change * cross + change * change * whole), valid & (whole > 0))
    return best


def _extreme(w: Float32) -> Float32:
    """The value of the largest magnitude of each block; the positive one of two."""
    low, high = np.minimum(w.min(-1), 0), np.maximum(w.max(-1), 0)
    extreme: Float32 = np.where(-low > high, low, high)
    return extreme


def _rounded(exact: Float32, zero_point: np.float32) -> Float32:
    """The numbers that can be stored, nearest to ``exact``."""
    clipped: Float32 = np.clip(exact, -zero_point, zero_point - np.float32(1))
    return np.rint(clipped)


def _lane_sums(terms: Float32) -> Float32:
    """Sum every 16th value, in order: (..., block) -> (..., 16)."""
    lanes = terms.reshape(*terms.shape[:-1], -1, LANES)
    total = np.zeros((*terms.shape[:-1], LANES), np.float32)
    for k in range(lanes.shape[-2]):
        total += lanes[..., k, :]
    return total


def _fold(lanes: Float32) -> Float32:
    """Sum the 16 lanes, halves onto halves: (..., 16) -> (...)."""
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    total: Float32 = lanes[..., 0]
    return total
