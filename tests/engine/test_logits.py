"""Choosing from logits: the compiled function against the plain one, ties, masks, broken numbers."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from cpmbee.logits import select as compiled
from cpmbee.plain.logits import select as plain

VOCABULARY = 40


def run(function, row, ext=(VOCABULARY, VOCABULARY), penalized=(), penalty=1.0, forbidden=-1, k=3):  # type: ignore[no-untyped-def]
    row = np.array(row, np.float32)
    values, ids = np.zeros(k, np.float32), np.zeros(k, np.int32)
    normalizer = function(row, VOCABULARY, *ext, np.array(penalized, np.int32), penalty, forbidden, values, ids)
    return normalizer, values.tolist(), ids.tolist(), row.tolist()


@given(
    st.lists(st.sampled_from([*np.linspace(-3, 3, 13).tolist(), -10000.0, 80.0]), min_size=50, max_size=50),
    st.tuples(st.integers(0, 10), st.integers(0, 10)).map(sorted),
    st.lists(st.integers(0, VOCABULARY - 1), max_size=6),
    st.sampled_from([1.0, 1.3, 0.5]),
    st.integers(-1, VOCABULARY - 1),
    st.integers(1, 8),
)
def test_compiled_equals_plain(row, ext, penalized, penalty, forbidden, k):  # type: ignore[no-untyped-def]
    ext = (VOCABULARY + ext[0], VOCABULARY + ext[1])
    got = run(compiled, row, ext, penalized, penalty, forbidden, k)
    expected = run(plain, row, ext, penalized, penalty, forbidden, k)
    assert got[0] == pytest.approx(expected[0], abs=2e-6)
    assert got[1:] == expected[1:]


@pytest.mark.parametrize("size", [1, 15, 16, 511, 512, 513, 5000])
def test_sum_is_exact_at_every_length(size: int) -> None:
    row = np.random.default_rng(size).normal(0, 8, size).astype(np.float32)
    values, ids = np.zeros(1, np.float32), np.zeros(1, np.int32)
    got = compiled(row.copy(), size, size, size, np.empty(0, np.int32), 1.0, -1, values, ids)
    wide = row.astype(np.float64)
    assert got == pytest.approx(wide.max() + math.log(np.exp(wide - wide.max()).sum()), abs=1e-6)
    assert ids[0] == row.argmax()


@pytest.mark.parametrize("function", [compiled, plain])
def test_equal_logits_keep_the_order_of_tokens(function) -> None:  # type: ignore[no-untyped-def]
    _, values, ids, _ = run(function, [1.0] * 50, (45, 50), k=4)
    assert ids == [0, 1, 2, 3]
    assert values == [1.0] * 4


@pytest.mark.parametrize("function", [compiled, plain])
def test_own_extension_follows_the_vocabulary(function) -> None:  # type: ignore[no-untyped-def]
    row = [0.0] * 40 + [9.0, 9.0, 5.0, 6.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0]
    normalizer, values, ids, _ = run(function, row, (42, 44), k=2)
    assert (ids, values) == ([VOCABULARY + 1, VOCABULARY], [6.0, 5.0])
    assert normalizer == pytest.approx(math.log(40 + math.exp(5) + math.exp(6)))


@pytest.mark.parametrize("function", [compiled, plain])
def test_a_token_is_masked_before_it_is_penalized_and_penalized_once(function) -> None:  # type: ignore[no-untyped-def]
    row = [1.0] * 48 + [-2.0, 4.0]
    row[3], row[4] = -2.0, 4.0
    *_, after = run(function, row, (50, 50), [3, 4, 3, 4, 5], 2.0, 5)
    assert after[3:6] == [-4.0, 2.0, -20000.0]


@pytest.mark.parametrize("function", [compiled, plain])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 17, 39])
def test_broken_logits_show_in_the_normalizer(function, broken, at) -> None:  # type: ignore[no-untyped-def]
    row = [0.0] * 50
    row[at] = broken
    assert not math.isfinite(run(function, row)[0])
