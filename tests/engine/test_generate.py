"""Generation through an exported model: batches, several answers, sampling, in-context examples, cancelling."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

import cpmbee
from cpmbee.engine import CacheUsage

REQUESTS = [
    {"input": "今天天气真好", "<ans>": ""},
    {"question": "abc,<option_0>,<option_1>", "options": {"<option_0>": "a", "<option_1>": "b"}, "<ans>": ""},
    {"input": "x" * 70, "prompt": "y<mask_0>", "<ans>": {"<mask_0>": "", "b": {"c": "", "d": ""}}},
    {"input": "☃ and ☃☃", "<ans>": {"one": "", "two": ""}},
]
EXAMPLES = [
    {"input": "今天天气", "<ans>": "好"},
    {"input": "<option_5>, ☂", "<ans>": "北京"},
]


@pytest.fixture(scope="module")
def engine(small_folder: Path) -> cpmbee.Engine:
    return cpmbee.Engine.from_pretrained(small_folder, num_threads=1, cache_tokens=2048)


@pytest.mark.parametrize("options", [{}, {"beam_size": 4, "repetition_penalty": 1.2}, {"temperature": 1.5, "seed": 3}])
@pytest.mark.parametrize("examples", [[], EXAMPLES])
def test_a_batch_gives_what_single_requests_give(engine: cpmbee.Engine, options, examples) -> None:  # type: ignore[no-untyped-def]
    before = copy.deepcopy((REQUESTS, examples))
    together = engine.generate(REQUESTS, examples, max_new_tokens=25, **options)
    assert (REQUESTS, examples) == before
    for i, (request, result) in enumerate(zip(REQUESTS, together, strict=True)):
        if "seed" in options:  # the place in the call is part of the seed
            alone = engine.generate(REQUESTS[: i + 1], examples, max_new_tokens=25, **options)[i]
        else:
            alone = engine.generate(request, examples, max_new_tokens=25, **options)
        assert alone.answer == result.answer
        assert alone.score == pytest.approx(result.score, rel=1e-4)
        assert alone.finish_reason == result.finish_reason
        assert alone.usage == result.usage
    assert engine.cache_usage.used == 0


def test_a_queue_longer_than_the_cache_keeps_its_order(small_folder: Path) -> None:
    engine = cpmbee.Engine.from_pretrained(small_folder, num_threads=1, cache_tokens=160)
    roomy = cpmbee.Engine.from_pretrained(small_folder, num_threads=1, cache_tokens=2048)
    many = REQUESTS * 3
    for options in ({}, {"beam_size": 3}):
        narrow = engine.generate(many, max_new_tokens=12, **options)
        wide = roomy.generate(many, max_new_tokens=12, **options)
        assert [r.answer for r in narrow] == [r.answer for r in wide]
    assert engine.cache_usage == CacheUsage(160, 0, 0)


def test_result_fields(engine: cpmbee.Engine) -> None:
    result = engine.generate(REQUESTS[2], max_new_tokens=1)
    assert result.finish_reason in ("length", "stop")
    assert result.usage.completion_tokens == 1
    assert result.usage.prompt_tokens == len(engine.encode(REQUESTS[2]))
    assert result.answer["<mask_0>"] is not None
    assert result.answer["b"] == {"c": None, "d": None}
    assert result.score < 0
    timings = result.timings
    assert timings.encode > 0
    assert timings.prefill > 0
    assert timings.decode == 0
    assert timings.total == timings.encode + timings.prefill
    assert engine.generate([]) == []


def test_sampling_repeats_with_a_seed(engine: cpmbee.Engine) -> None:
    def draw(**options: object) -> object:
        return engine.generate(REQUESTS[0], max_new_tokens=20, **options).answer

    assert draw(temperature=2.0, seed=1) == draw(temperature=2.0, seed=1)
    assert len({draw(temperature=2.0, seed=seed) for seed in range(8)}) > 4
    assert len({draw(temperature=2.0) for _ in range(8)}) > 4
    assert draw(top_k=1) == draw() == draw(temperature=0) == draw(top_p=1e-6)
    assert draw(temperature=0.01, seed=5) == draw()


def test_sampled_frequencies_follow_the_probabilities(engine: cpmbee.Engine) -> None:
    request = {"input": "a", "<ans>": ""}
    counts: dict[str, int] = {}
    for seed in range(400):
        answer = str(engine.generate(request, max_new_tokens=1, temperature=1.0, top_k=3, seed=seed).answer)
        counts[answer] = counts.get(answer, 0) + 1
    assert len(counts) == 3
    scores = {}
    for seed in range(400):
        result = engine.generate(request, max_new_tokens=1, temperature=1.0, top_k=3, seed=seed)
        scores[str(result.answer)] = np.exp(result.score)
        if len(scores) == 3:
            break
    total = sum(scores.values())
    for answer, probability in scores.items():
        assert counts[answer] / 400 == pytest.approx(probability / total, abs=0.08)


def test_examples_are_computed_once_and_give_way(small_folder: Path) -> None:
    engine = cpmbee.Engine.from_pretrained(small_folder, num_threads=1, cache_tokens=150)
    first = engine.generate(REQUESTS[0], EXAMPLES, max_new_tokens=10)
    tokens = len(engine.encode(REQUESTS[0], EXAMPLES)) - len(engine.encode(REQUESTS[0]))
    assert engine.cache_usage == CacheUsage(150, 0, tokens)
    assert engine.generate(REQUESTS[0], EXAMPLES, max_new_tokens=10).answer == first.answer
    assert engine.cache_usage.kept == tokens
    engine.generate({"input": "z" * 125, "<ans>": ""}, max_new_tokens=10)  # needs their rows
    assert engine.cache_usage == CacheUsage(150, 0, 0)
    assert engine.generate(REQUESTS[0], EXAMPLES, max_new_tokens=10).answer == first.answer
    assert first.answer != engine.generate(REQUESTS[0], max_new_tokens=10).answer


def test_the_same_example_twice(engine: cpmbee.Engine) -> None:
    twice = [EXAMPLES[0], EXAMPLES[0]]
    assert engine.generate(REQUESTS[0], twice, max_new_tokens=5).answer is not None
    assert engine.cache_usage.used == 0


@pytest.mark.parametrize("options", [{}, {"beam_size": 3}, {"top_p": 0.9, "seed": 1}])
def test_cancelling_gives_what_there_is(engine: cpmbee.Engine, options) -> None:  # type: ignore[no-untyped-def]
    steps: list[int] = []

    def on_step(step: int) -> bool:
        steps.append(step)
        return step < 4

    request = {"input": "今天天气真好", "<ans>": dict.fromkeys("abcdefgh", "")}
    result = engine.generate([request, request], on_step=on_step, max_new_tokens=50, **options)[0]
    assert steps == [1, 2, 3, 4]
    assert result.finish_reason == "cancelled"
    assert result.usage.completion_tokens <= 4
    assert engine.cache_usage.used == 0


def test_prompt_longer_than_the_cache(engine: cpmbee.Engine) -> None:
    steps: list[int] = []
    with pytest.raises(cpmbee.CacheFullError, match=r"needs \d+ cache rows .* there are 2048"):
        engine.generate([REQUESTS[0], {"input": "a" * 3000, "<ans>": ""}], on_step=steps.append)  # type: ignore[func-returns-value]
    assert steps == []
    with pytest.raises(cpmbee.CacheFullError, match="cache_tokens="):
        engine.stream({"input": "a" * 3000, "<ans>": ""})
    with pytest.raises(MemoryError):
        engine.generate(REQUESTS[0], beam_size=8, max_new_tokens=1000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": 3}, "unknown generation option 'beam'; did you mean .*beam_size"),
        ({"max_tokens": 3}, "max_new_tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer from 1"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"beam_size": 0}, "beam_size"),
        ({"beam_size": True}, "beam_size"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number of at least 0.0001"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"beam_size": 2, "top_k": 3}, "does not combine with sampling"),
    ],
)
def test_bad_options(engine: cpmbee.Engine, options, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(cpmbee.ConfigError, match=message):
        engine.generate(REQUESTS[0], **options)


def test_bad_requests_name_their_place(engine: cpmbee.Engine) -> None:
    with pytest.raises(cpmbee.PromptError, match="a request is a dict"):
        engine.generate("今天天气真好")  # type: ignore[call-overload]
    with pytest.raises(cpmbee.PromptError, match=r"request 1: .*<ans>"):
        engine.generate([REQUESTS[0], {"input": "a"}])
    with pytest.raises(cpmbee.TokenizeError, match=r"request 0: \$\.input"):
        engine.generate([{"input": "a < b", "<ans>": ""}])
    with pytest.raises(cpmbee.PromptError, match="examples must be a list"):
        engine.generate(REQUESTS[0], EXAMPLES[0])  # type: ignore[call-overload]
    assert engine.cache_usage.used == 0
