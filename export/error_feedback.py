"""Rounding that makes up for itself: what one input's weights lose, the weights of the inputs after it give back.

Inputs of a matrix are correlated, so an error in the weight of one can be undone, in part, by changing the weights of
others. With the second moments H of the inputs, the best correction of all weights that are not rounded yet is known in
closed form (Hassibi and Stork, "Optimal Brain Surgeon", 1993). Frantar et al., "GPTQ: Accurate Post-Training
Quantization for Generative Pre-trained Transformers", 2022, take the inputs in their order, all outputs at once, and
one Cholesky factor for all corrections. Here each block of inputs first gets the scales that `cpmbee.export.quantize`
would find for its corrected weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cpmbee.export.packing import LANES, BlockFormat, Float16, Float32, pack
from cpmbee.export.plain_quantize import Quantized

Scales = Callable[[Float32, Float32], Float16]


class Moments(NamedTuple):
    """What is known of a matrix's inputs.

    Attributes:
        squares: mean square of each input, (inputs,).
        factor: upper triangular U with ``inverse of H = transpose of U * U``, (inputs, inputs), H being the mean
            products of all pairs of inputs, its diagonal raised a little.
    """

    squares: Float32
    factor: Float32


def quantize_corrected(rows: Float32, moments: Moments, layout: BlockFormat, block_scales: Scales) -> Quantized:
    """Quantize some rows of a matrix, each input's rounding corrected by those after it.

    Args:
        rows: fp32, padded; ``moments`` is of the inputs that are not padding.
        moments: of the inputs.
        layout: bits and block size.
        block_scales: finds the scales (rows,) of a block of weights (rows, block) whose errors are weighed by (block,).

    Returns:
        The stored numbers; the error and the power are those of outputs, the power taking inputs as uncorrelated.
    """
    dim_in, block = len(moments.squares), layout.block_size
    left = np.ascontiguousarray(rows.T)  # (inputs, rows): what is still to be rounded, corrections included
    power = float(moments.squares @ np.square(left[:dim_in], dtype=np.float32).sum(1, dtype=np.float64))
    numbers = np.full(left.shape, layout.zero_point, np.uint8)
    scales = np.zeros((left.shape[0] // block, len(rows)), np.float16)
    lowest, highest = np.float32(-layout.zero_point), np.float32(layout.zero_point - 1)
    error = 0.0
    for begin in range(0, dim_in, block):
        end = min(begin + block, dim_in)
        factor = moments.factor[begin:end, begin:end]
        importance = np.zeros(block, np.float32)
        importance[: end - begin] = 1 / np.square(factor.diagonal())  # what an error costs after correction
        scales[begin // block] = block_scales(np.ascontiguousarray(left[begin : begin + block].T), importance)
        scale = scales[begin // block].astype(np.float32)
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        lost = np.empty((end - begin, len(rows)), np.float32)
        for i in range(end - begin):
            wanted = left[begin + i]
            rounded = np.rint(np.clip(wanted * inverse, lowest, highest))
            numbers[begin + i] = rounded + layout.zero_point
            lost[i] = (wanted - rounded * scale) / factor[i, i]
            left[begin + i + 1 : end] -= factor[i, i + 1 :, None] * lost[i]
        left[end:dim_in] -= moments.factor[begin:end, end:].T @ lost
        error += float(np.square(lost).sum(dtype=np.float64))
    by_lane = np.ascontiguousarray(scales.T.reshape(-1, LANES, len(scales)).transpose(0, 2, 1))
    return Quantized(pack(np.ascontiguousarray(numbers.T), layout), by_lane, error, power)
