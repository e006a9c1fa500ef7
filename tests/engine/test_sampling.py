"""Which tokens may be drawn, and how often, at the edges."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given

from cpmbee.sampling import truncated

LOGITS = hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-30, 30, width=32))


def naive(
    logits: npt.NDArray[np.float32], temperature: float, top_k: int | None, top_p: float | None
) -> dict[int, float]:
    """Token -> probability, one token at a time."""
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[:top_k]
    total = sum(weights[token] for token in order)
    kept: dict[int, float] = {}
    for token in order:
        if top_p is not None and top_p < 1 and kept and sum(kept.values()) >= top_p * total:
            break
        kept[token] = weights[token]
    total = sum(kept.values())
    return {token: weight / total for token, weight in kept.items()}


@given(
    LOGITS,
    st.sampled_from([0.3, 1.0, 4.0]),
    st.one_of(st.none(), st.integers(1, 70)),
    st.sampled_from([None, 0.05, 0.5, 0.93, 1.0]),
)
def test_equals_the_definition(logits, temperature, top_k, top_p) -> None:  # type: ignore[no-untyped-def]
    tokens, weights = truncated(logits, temperature, top_k, top_p)
    expected = naive(logits, temperature, top_k, top_p)
    got = dict(zip(tokens.tolist(), (weights / weights.sum()).tolist(), strict=True))
    assert all(expected[token] < 1e-12 for token in expected.keys() - got.keys())
    surplus = got.keys() - expected.keys()  # where the sum meets top_p to the last bit, one more may be in
    assert len(surplus) <= 1
    if not surplus:
        for token, probability in got.items():
            assert probability == pytest.approx(expected[token], rel=1e-6)


def test_masked_tokens_are_never_drawn() -> None:
    logits = np.array([0.0, -np.inf, 0.0], np.float32)
    tokens, weights = truncated(logits, 100.0, None, None)
    assert 1 not in tokens.tolist()
    assert weights.tolist() == [1.0, 1.0]
