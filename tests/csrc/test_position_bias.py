"""BucketedPositionBias: native kernel, function body and NumPy give the same bits."""

from __future__ import annotations

import numpy as np
import pytest

from cpmbee import native
from tests.csrc.attention_model import expected_bias, open_session, position_bias_model, requires_native


@pytest.mark.parametrize("use_native", [pytest.param(True, marks=requires_native), False])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 5, 33), (3, 64, 200)])
def test_bias_is_the_table_row_or_minus_infinity(sizes: tuple[int, int, int], constant: bool, use_native: bool) -> None:
    rng = np.random.default_rng(sum(sizes))
    relation = rng.integers(-1, 30, sizes, dtype=np.int16)
    table = rng.standard_normal((30, 5), dtype=np.float32)
    session = open_session(position_bias_model(5, table if constant else None), use_native=use_native, threads=2)
    before = native.call_counts()["BucketedPositionBias"]
    (bias,) = session.run(None, {"relation": relation} | ({} if constant else {"table": table}))
    np.testing.assert_array_equal(bias, expected_bias(relation, table))
    assert native.call_counts()["BucketedPositionBias"] == before + use_native
