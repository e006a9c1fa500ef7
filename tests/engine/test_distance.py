"""Distance buckets are those of the framework that the models were trained with."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cpmbee.distance import distance_buckets


@pytest.mark.parametrize(
    ("buckets", "reach"), [(256, 2048), (256, 4096), (32, 128), (16, 12), (8, 3), (64, 100), (24, 48), (4, 2)]
)
def test_distance_buckets_are_those_of_single_precision_torch(buckets: int, reach: int) -> None:
    torch = pytest.importorskip("torch")
    half, exact = buckets // 2, buckets // 4
    distance = torch.arange(2 * reach)
    large = torch.log(distance.float() / exact) / math.log(reach / exact) * (half - exact)
    expected = torch.where(distance < exact, distance, (exact + large.to(torch.int32)).clamp(max=half - 1)).numpy()
    ours = distance_buckets(buckets, reach)
    np.testing.assert_array_equal(ours, expected[: reach + 1])
    assert (expected[reach:] == ours[-1]).all()
