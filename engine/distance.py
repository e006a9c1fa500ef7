"""Which bucket of the bias table stands for a distance between two positions of one segment."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from cpmbee.config import ModelConfig


def distance_buckets(num_buckets: int, max_distance: int) -> npt.NDArray[np.int16]:
    """Buckets of the distances 0 to ``max_distance``, for keys that do not come after their query.

    Exact for the first quarter of ``num_buckets``, logarithmic up to half of it. Computed in single precision like
    the research code, so that distances on the border of two buckets fall on the same side.

    Returns:
        int16[max_distance + 1]; every greater distance has the last one's bucket.
    """
    half = num_buckets // 2
    exact = half // 2
    distances = np.arange(max_distance + 1)
    ratio = np.maximum(distances, 1).astype(np.float32) / np.float32(exact)
    # A logarithm rounded once from double: NumPy's own single-precision one differs between machines.
    logarithm = np.log(ratio.astype(np.float64)).astype(np.float32)
    scaled = logarithm / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    buckets = np.where(distances < exact, distances, exact + scaled.astype(np.int64))
    return np.minimum(buckets, half - 1).astype(np.int16)


def signed_distance_buckets(config: ModelConfig) -> npt.NDArray[np.int16]:
    """Buckets of key position minus query position, from ``-max_distance`` to ``max_distance``.

    Returns:
        int16[2 * max_distance + 1]; greater distances have the buckets of the ends.
    """
    back = distance_buckets(config.position_bias_num_buckets, config.position_bias_max_distance)
    ahead = back[1:] + np.int16(config.position_bias_num_buckets // 2)
    return np.concatenate([back[::-1], ahead])
