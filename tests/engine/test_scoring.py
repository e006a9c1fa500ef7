"""Log-probabilities of given answers: equal to the reference's forward, batched or not, whole or in pieces."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cpmbee
from cpmbee import scoring_job
from cpmbee.engine import Engine
from cpmbee.errors import CacheFullError, InferenceError, PromptError, TokenizeError
from cpmbee.export.reference import ReferenceBackend
from cpmbee.model import CpmBee, load_model
from cpmbee.relation import RelationBuilder, TokenLayout
from cpmbee.runner import Runner
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.torch_backend import TorchBackend
from tests.engine.backends import WatchedBackend

OPTIONS = {
    "input": "今天天气",
    "options": {"<option_0>": "北京", "<option_1>": "上学", "<option_2>": "☃", "<用户>": "好"},
    "<ans>": "",
}
OPTION_CHOICES = ["<option_0>", "<option_2>", "", "北京☃好", "<用户>", "<option_1><option_1>"]
TWO = {"input": "ab☂", "<ans>": {"x": "", "y": {"z": ""}}}
TWO_CHOICES = [{"x": "今天", "y": {"z": "a"}}, {"x": "", "y": {"z": ""}}, {"x": "☂c", "y": {"z": "天气☂"}}]
EXAMPLES = [{"input": "北京☂", "<ans>": "好☂"}, {"input": "<option_3>", "<ans>": {"a": "<option_3>", "b": "ab"}}]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reference_logprob(
    model: CpmBee, tokenizer: Tokenizer, request: dict[str, Any], choice: Any, examples: list[dict[str, Any]]
) -> tuple[float, int]:
    """One choice by itself, in one plain forward over everything; the tokens are found by hand."""
    prompt = cpmbee.encode_prompt(request, tokenizer, examples)
    ext = [token for token in prompt.ext_tokens if token[1]]
    known = {text: token for token, text in prompt.ext_tokens.items()}
    layout = TokenLayout.from_prompt(prompt)
    ids, subs = prompt.input_ids.tolist(), prompt.input_subs.tolist()
    targets: list[int] = []
    for slot in prompt.answers:
        text = choice
        for key in slot.path:
            text = text[key]
        pieces, table = tokenizer.encode(text)
        tokens = [known[table[piece]] if piece in table else (piece, 0) for piece in pieces]
        for position, (token, sub) in enumerate([(tokenizer.bos_id, 0), *tokens]):
            layout.append(slot.segment_id, position)
            ids.append(token)
            subs.append(sub)
        targets += [token[0] if not token[1] else tokenizer.vocab_size + ext.index(token) for token in tokens]
        targets.append(tokenizer.eos_id)
    relation = np.empty((1, len(ids), len(ids)), np.int16)
    RelationBuilder(model.config).fill(relation[0], layout)
    with torch.inference_mode():
        logits = model(
            torch.tensor([ids]),
            torch.tensor([subs]),
            torch.from_numpy(relation),
            torch.tensor([base for base, _ in ext], dtype=torch.long),
            torch.tensor([sub for _, sub in ext], dtype=torch.long),
        ).logits[0, -len(targets) :]
    if (tokenizer.unk_id, 0) not in prompt.ext_tokens:
        logits[:, tokenizer.unk_id] = -10000
    chosen = logits.double().log_softmax(-1)[torch.arange(len(targets)), torch.tensor(targets)]
    return float(chosen.sum()), len(targets)


@pytest.fixture(scope="module", params=["native", "function", "reference", "torch"])
def engine(request: pytest.FixtureRequest, small_folder: Path, small_checkpoint: Path) -> Engine:
    tokenizer = Tokenizer.from_file(small_folder / "vocab.txt")
    if request.param == "reference":
        return Engine(ReferenceBackend(load_model(small_checkpoint), 512), tokenizer)
    if request.param == "torch":
        return Engine(TorchBackend(load_model(small_checkpoint), 512), tokenizer)
    return Engine.from_pretrained(small_folder, num_threads=1, cache_tokens=512, native=request.param == "native")


@pytest.mark.parametrize("examples", [[], EXAMPLES], ids=["plain", "in context"])
@pytest.mark.parametrize("limit", [1024, 3, 1], ids=["one run", "runs of 3", "runs of 1"])
def test_equal_to_one_plain_forward(
    engine: Engine, small_checkpoint: Path, examples: list[Any], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring_job, "RUN_TOKENS", limit)
    model = load_model(small_checkpoint)
    requests, choices = [OPTIONS, TWO], [OPTION_CHOICES, TWO_CHOICES]
    together = engine.score(requests, choices, examples)
    for request, given, scores in zip(requests, choices, together, strict=True):
        assert [score.choice for score in scores] == given
        for score in scores:
            expected, tokens = reference_logprob(model, engine.tokenizer, request, score.choice, examples)
            assert score.logprob == pytest.approx(expected, rel=0, abs=1e-4 * max(1, tokens / 4))
            assert score.tokens == tokens
            assert score.mean_logprob == pytest.approx(expected / tokens, rel=0, abs=1e-4)
    assert engine.cache_usage.used == 0


def test_one_request_gives_one_list(engine: Engine) -> None:
    alone = engine.score(OPTIONS, OPTION_CHOICES)
    several = engine.score([OPTIONS], [OPTION_CHOICES])
    assert len(several) == 1
    assert [s.logprob for s in several[0]] == pytest.approx([s.logprob for s in alone], abs=1e-5)
    assert engine.score([], []) == []


def test_score_of_a_generated_answer_is_its_score(engine: Engine) -> None:
    for request in (OPTIONS, TWO):
        for examples in ([], EXAMPLES):
            result = engine.generate(request, examples, max_new_tokens=60, beam_size=3)
            if result.finish_reason != "stop":
                continue
            assert result.answer is not None
            (score,) = engine.score(request, [result.answer], examples)
            assert score.tokens == result.usage.completion_tokens
            assert score.mean_logprob == pytest.approx(result.score, abs=1e-4)


def test_many_requests_of_different_lengths_in_a_small_cache(small_folder: Path) -> None:
    large = Engine.from_pretrained(small_folder, num_threads=1)
    small = Engine.from_pretrained(small_folder, num_threads=1, cache_tokens=80)
    requests = [{"input": "今天天气ab" * (i % 7), "<ans>": ""} for i in range(30)]
    choices = [["a" * (i % 5 + k) for k in range(10)] for i in range(30)]
    expected = large.score(requests, choices)
    for one, other in zip(small.score(requests, choices), expected, strict=True):
        assert [s.logprob for s in one] == pytest.approx([s.logprob for s in other], abs=2e-4)
    assert small.cache_usage.used == large.cache_usage.used == 0


def test_prompt_is_read_once(small_folder: Path, small_checkpoint: Path) -> None:
    queries: list[int] = []

    def watch(runner: Runner) -> None:
        queries.append(int((runner.new_slots != 0).sum()))

    backend = WatchedBackend(ReferenceBackend(load_model(small_checkpoint), 512), watch)
    engine = Engine(backend, Tokenizer.from_file(small_folder / "vocab.txt"))
    engine.score(OPTIONS, OPTION_CHOICES)
    scores = engine.score(OPTIONS, OPTION_CHOICES)
    one_run = len(engine.encode(OPTIONS)) + 1 + sum(score.tokens - 1 for score in scores)
    assert queries == [one_run, one_run]


@pytest.mark.parametrize(
    ("request_", "choices", "error", "message"),
    [
        (OPTIONS, [], PromptError, "choices: there are none"),
        (OPTIONS, "北京", PromptError, "choices must be a list of answers, not str"),
        (OPTIONS, ["a", 3], PromptError, r"choices\[1\]: expected a string, not int"),
        (OPTIONS, [{"x": "a"}], PromptError, r"choices\[0\]: expected a string, not dict"),
        (
            OPTIONS,
            ["☂"],
            PromptError,
            r"choices\[0\]: holds '☂', which is neither in the vocabulary nor in the request",
        ),
        (OPTIONS, ["<option_7>"], PromptError, "holds '<option_7>', which is neither"),
        ({"input": "a", "<ans>": ""}, ["<unk>"], PromptError, "holds '<unk>', which is neither"),
        (OPTIONS, ["a</s>"], PromptError, r"choices\[0\]: holds </s>, which ends an answer"),
        (OPTIONS, ["a < b"], TokenizeError, r"choices\[0\]: the `<` at character 2"),
        (TWO, ["a"], PromptError, r"choices\[0\]: expected a dict shaped like <ans>, not str"),
        (TWO, [{"x": "a"}], PromptError, r"choices\[0\]: has no 'y', which <ans> has"),
        (TWO, [{"x": "a", "y": {"z": "", "w": ""}}], PromptError, r"choices\[0\]\.y: has 'w', which <ans> does not"),
        (TWO, [{"x": "a", "y": {"z": None}}], PromptError, r"choices\[0\]\.y\.z: expected a string, not NoneType"),
        ({"input": "a"}, ["a"], PromptError, r'\$: has no "<ans>" key'),
        (OPTIONS, ["a" * 600], CacheFullError, "and its longest choice need .* there are 512"),
        (
            {"input": "a" * 600, "<ans>": ""},
            ["a"],
            CacheFullError,
            "shorten them, or load the engine with cache_tokens",
        ),
    ],
)
def test_what_cannot_be_scored(
    engine: Engine, request_: Any, choices: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine.score(request_, choices)
    with pytest.raises(error, match="request 1: "):
        engine.score([OPTIONS, request_], [["a"], choices])
    assert engine.cache_usage.used == 0


def test_requests_and_choices_must_match(engine: Engine) -> None:
    with pytest.raises(PromptError, match="2 requests need as many lists of choices, not 1"):
        engine.score([OPTIONS, TWO], [["a"]])
    with pytest.raises(PromptError, match="a request is a dict"):
        engine.score("今天", ["a"])  # type: ignore[call-overload]


def test_rows_come_back_when_the_model_is_broken(small_folder: Path, small_checkpoint: Path) -> None:
    model = load_model(small_checkpoint)
    with torch.no_grad():
        model.encoder.output_layernorm.weight[0] = math.nan
    engine = Engine(TorchBackend(model, 256), Tokenizer.from_file(small_folder / "vocab.txt"))
    with pytest.raises(InferenceError, match="not finite"):
        engine.score([OPTIONS, OPTIONS], [OPTION_CHOICES, OPTION_CHOICES], EXAMPLES)
    assert engine.cache_usage.used == 0


def test_beside_generation_in_other_threads(small_folder: Path) -> None:
    engine = Engine.from_pretrained(small_folder, num_threads=1, cache_tokens=160)
    expected = [score.logprob for score in engine.score(OPTIONS, OPTION_CHOICES, EXAMPLES)]
    found: list[list[float]] = []

    def score() -> None:
        for _ in range(5):
            found.append([score.logprob for score in engine.score(OPTIONS, OPTION_CHOICES, EXAMPLES)])

    def generate() -> None:
        for _ in range(5):
            engine.generate([OPTIONS, TWO], max_new_tokens=6, beam_size=2)

    threads = [threading.Thread(target=target) for target in (score, generate, score)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 10
    for scores in found:
        assert scores == pytest.approx(expected, abs=2e-4)
    assert engine.cache_usage.used == 0
