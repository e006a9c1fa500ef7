"""Which tokens may be drawn, and how often, at the edges."""

from __future__ import annotations

from collections import Counter

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given

import cpmbee
from cpmbee.encoding import Data
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


SAMPLING = {"temperature": 3.0, "seed": 5, "max_new_tokens": 8}
ASKED = [{"input": text, "<ans>": ""} for text in ("今天", "ab", "今天", "天气", "今天")]


@pytest.fixture(scope="module")
def engine(small_folder):  # type: ignore[no-untyped-def]
    return cpmbee.Engine.from_pretrained(small_folder, num_threads=1)


def answers(engine: cpmbee.Engine, requests: list[Data], **options: object) -> list[object]:
    return [result.answer for result in engine.generate(requests, **{**SAMPLING, **options})]


def test_a_seeded_answer_depends_neither_on_place_nor_on_company(engine: cpmbee.Engine) -> None:
    together = answers(engine, ASKED)
    assert answers(engine, ASKED[1:2]) == together[1:2]
    assert answers(engine, [ASKED[3], ASKED[0], ASKED[1]]) == [together[3], together[0], together[1]]
    assert answers(engine, ASKED, seed=6) != together


def test_equal_requests_of_one_call_differ_and_count_on(engine: cpmbee.Engine) -> None:
    together = answers(engine, ASKED)
    equal = [together[0], together[2], together[4]]
    assert len(set(equal)) == 3
    assert answers(engine, [ASKED[0]] * 3) == equal
    repeats: Counter[int] = Counter()
    assert [answers(engine, [ASKED[0]], repeats=repeats)[0] for _ in range(3)] == equal
    assert list(repeats.values()) == [3]
    assert answers(engine, [ASKED[0]]) * 2 == equal[:1] * 2, "every call counts for itself"


def test_a_stream_begins_like_the_first_of_a_call(engine: cpmbee.Engine) -> None:
    text = "".join(piece.text for piece in engine.stream(ASKED[1], **SAMPLING))
    assert [text] == answers(engine, ASKED[1:2])


def test_examples_are_a_part_of_the_request(engine: cpmbee.Engine) -> None:
    from cpmbee.request import request_hash

    bare, taught = engine.encode(ASKED[0]), engine.encode(ASKED[0], [{"input": "a", "<ans>": "b"}])
    assert request_hash(bare) == request_hash(engine.encode(dict(ASKED[0])))
    assert request_hash(bare) != request_hash(taught)
    assert 0 <= request_hash(bare) < 1 << 64


def test_without_a_seed_nothing_is_counted(engine: cpmbee.Engine) -> None:
    repeats: Counter[int] = Counter()
    engine.generate(ASKED, temperature=1.0, max_new_tokens=2, repeats=repeats)
    engine.generate(ASKED, max_new_tokens=2, seed=1, repeats=repeats)
    assert not repeats
