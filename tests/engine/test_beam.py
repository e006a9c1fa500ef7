"""Beam search against the original's loop, written down naively, on a made-up language model."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import cpmbee
from cpmbee.prompt import encode_prompt
from tests.engine.backends import TableBackend
from tests.model.factory import VOCABULARY, tiny_config

TOKENIZER = cpmbee.Tokenizer(VOCABULARY[:14])  # few tokens, so that answers end often
CONFIG = tiny_config(vocab_size=14)

REQUESTS = (
    {"input": "abc", "<ans>": ""},
    {"input": "ab", "<ans>": {"a": "", "b": ""}},
    {"input": "a<option_0>b<option_1>c<option_2>", "<ans>": ""},
    {"input": "b气<unk_2>", "<ans>": {"x": {"y": "", "z": ""}, "w": ""}},
)


def original(backend: TableBackend, data: dict, beam_size: int, length: int, penalty: float, window: int | None):  # type: ignore[type-arg, no-untyped-def]
    """The best hypothesis as ((token, answer), ...) and its score, found the original's way: nothing is cached."""
    prompt = encode_prompt(data, TOKENIZER)
    space = [*((i, 0) for i in range(14)), *(key for key in prompt.ext_tokens if key[1])]
    start = list(zip(prompt.input_ids.tolist(), prompt.input_subs.tolist(), strict=True))
    bos, eos, unk = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.unk_id
    beams = [(np.float32(0 if i == 0 else -1e9), [], [(bos, 0)], 0) for i in range(beam_size)]
    kept: list[tuple[float, list[tuple[int, int]]]] = []
    for step in range(length):
        scored = []
        for b, (total, _, fed, _) in enumerate(beams):
            logits = backend.logits(np.array(start + fed), len(space) - 14)
            if (unk, 0) not in prompt.ext_tokens:
                logits[unk] = -10000
            for token in {token for token, _ in (fed if window is None else fed[-window:])}:
                logits[token] = (
                    logits[token] * np.float32(penalty) if logits[token] < 0 else logits[token] / np.float32(penalty)
                )
            wide = logits.astype(np.float64)
            log_sum = wide.max() + np.log(np.exp(wide - wide.max()).sum())
            scored += [(np.float32(logits[t] - np.float32(log_sum)) + total, b, t) for t in range(len(space))]
        scored.sort(key=lambda item: -item[0])
        scored = scored[: 2 * beam_size]
        if len(kept) >= beam_size and min(score for score, _ in kept) >= float(scored[0][0]) / step:
            break
        grown = []
        for total, b, token in scored:
            _, written, fed, answer = beams[b]
            longer = [*written, (token, answer)]
            if step == length - 1 or (token == eos and answer == len(prompt.answers) - 1):
                score = float(total) / len(longer)
                if len(kept) < beam_size or score > min(s for s, _ in kept):
                    kept.append((score, longer))
                    if len(kept) > beam_size:
                        kept.remove(min(kept, key=lambda item: item[0]))
            elif token == eos:
                grown.append((total, longer, [*fed, (bos, 0)], answer + 1))
            else:
                grown.append((total, longer, [*fed, space[token]], answer))
            if len(grown) == beam_size:
                break
        beams = grown
    return max(kept, key=lambda item: item[0])


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from(REQUESTS),
    st.integers(1, 6),
    st.integers(1, 9),
    st.sampled_from([1.0, 1.4]),
    st.sampled_from([None, 1, 3]),
)
def test_finds_what_the_original_finds(seed, data, beam_size, length, penalty, window) -> None:  # type: ignore[no-untyped-def]
    backend = TableBackend(CONFIG, seed=seed)
    engine = cpmbee.Engine(backend, TOKENIZER)
    score, pairs = original(backend, data, beam_size, length, penalty, window)
    stream = engine.stream(
        data,
        beam_size=beam_size,
        max_new_tokens=length,
        repetition_penalty=penalty,
        repetition_window=window,
    )
    pieces = list(stream)
    result = stream.result
    assert result.score == pytest.approx(score, rel=1e-5)
    assert result.usage.completion_tokens == len(pairs)
    ended = pairs[-1] == (TOKENIZER.eos_id, _count(data["<ans>"]) - 1)
    assert result.finish_reason == ("stop" if ended else "length")
    texts: dict[tuple[str, ...], str] = {}
    for piece in pieces:
        texts[piece.path] = texts.get(piece.path, "") + piece.text
    for path, text in _leaves(result.answer):
        assert texts.get(path, "") == (text or "")
    assert engine.cache_usage.used == 0
    assert (
        result.answer
        == engine.generate(
            data,
            beam_size=beam_size,
            max_new_tokens=length,
            repetition_penalty=penalty,
            repetition_window=window,
        ).answer
    )


def _count(answer: object) -> int:
    return sum(map(_count, answer.values())) if isinstance(answer, dict) else 1


def _leaves(answer, path=()):  # type: ignore[no-untyped-def]
    if isinstance(answer, dict):
        for key, inner in answer.items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, answer


def test_more_beams_than_tokens_is_refused() -> None:
    engine = cpmbee.Engine(TableBackend(CONFIG), TOKENIZER)
    with pytest.raises(cpmbee.ConfigError, match="half the vocabulary"):
        engine.generate(REQUESTS[0], beam_size=8)
