"""In-context examples: step by step, with shared rows, equals the packed forward on the same arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import cpmbee
from cpmbee.export.reference import ReferenceBackend
from cpmbee.folder import open_folder
from cpmbee.model import CpmBee, load_model
from cpmbee.relation import RelationBuilder, TokenLayout
from cpmbee.runner import Backend, Runner
from cpmbee.session import OrtBackend
from tests.engine.backends import WatchedBackend

REQUEST = {"input": "今天<option_0>天气<option_1>☃", "q": "abc", "<ans>": {"a": "", "b": ""}}
EXAMPLES = [
    {"input": "北京☂", "<ans>": "好☂"},
    {"input": "上学<option_3>", "q": {"x": "abc"}, "<ans>": {"a": "<option_3>", "b": "ab"}},
    {"input": "北京", "<ans>": "好"},
]


def packed_logits(model: CpmBee, prompt: cpmbee.Prompt, fed: list[tuple[int, int, int]]) -> np.ndarray:  # type: ignore[type-arg]
    """Logits after each fed (id, sub, segment) in one forward over the request, its answers, then the examples."""
    count = len(prompt)
    own = int((prompt.sample_ids == 0).sum())
    columns = np.zeros((7, count), np.int32)
    columns[:] = (
        prompt.segment_ids,
        prompt.sample_ids,
        prompt.positions,
        prompt.context,
        np.zeros(count),
        prompt.num_segments,
        prompt.rel_offset,
    )
    answers = np.zeros((7, len(fed)), np.int32)
    answers[0] = [segment for *_, segment in fed]
    answers[2] = own + np.arange(len(fed))  # positions run on, as in a packed row
    answers[5:] = columns[5:, :1]
    columns[2, own:] += len(fed)
    columns = np.concatenate([columns[:, :own], answers, columns[:, own:]], 1)
    length = columns.shape[1]
    layout = TokenLayout(columns, prompt.segment_rel)
    relation = np.empty((length, length), np.int16)
    RelationBuilder(model.config).fill(relation, layout)
    ids = [*prompt.input_ids[:own], *(i for i, *_ in fed), *prompt.input_ids[own:]]
    subs = [*prompt.input_subs[:own], *(sub for _, sub, _ in fed), *prompt.input_subs[own:]]
    ext = [key for key in prompt.ext_tokens if key[1]]
    with torch.inference_mode():
        output = model(
            torch.tensor(ids)[None],
            torch.tensor(subs)[None],
            torch.from_numpy(relation)[None],
            torch.tensor([base for base, _ in ext]),
            torch.tensor([sub for _, sub in ext]),
        )
    return output.logits[0, own : own + len(fed)].numpy()


@pytest.mark.parametrize("way", ["reference", "native", "function"])
@pytest.mark.parametrize("warm", [False, True])
def test_steps_equal_the_packed_forward(way: str, warm: bool, small_checkpoint: Path, small_folder: Path) -> None:
    model = load_model(small_checkpoint)
    inner: Backend
    if way == "reference":
        inner = ReferenceBackend(model, 512)
    else:
        inner = OrtBackend(open_folder(small_folder), num_threads=1, cache_tokens=512, native=way == "native")
    seen: list[tuple[int, int, np.ndarray]] = []  # type: ignore[type-arg]

    def watch(runner: Runner) -> None:
        last = int(runner.logits_index[0, 0])
        seen.append((int(runner.input_ids[0, last]), int(runner.input_subs[0, last]), runner.logits[0, 0].copy()))

    engine = cpmbee.Engine(WatchedBackend(inner, watch), cpmbee.Tokenizer.from_file(small_folder / "vocab.txt"))
    if warm:  # the examples' rows come from an earlier call
        engine.generate({**REQUEST, "q": "cba"}, EXAMPLES, max_new_tokens=3)
        assert engine.cache_usage.kept > 0
    seen.clear()
    result = engine.generate(REQUEST, EXAMPLES, max_new_tokens=12)
    steps = seen[-result.usage.completion_tokens :]
    runs_for_examples = len(seen) - len(steps)
    assert (runs_for_examples == 0) == warm

    prompt = engine.encode(REQUEST, EXAMPLES)
    bos, answer, fed = engine.tokenizer.bos_id, -1, []
    for token, sub, _ in steps:
        answer += token == bos
        fed.append((token, sub, prompt.answers[answer].segment_id))
    expected = packed_logits(model, prompt, fed)
    unk = engine.tokenizer.unk_id
    for (*_, logits), row in zip(steps, expected, strict=True):
        np.testing.assert_allclose(np.delete(logits, unk), np.delete(row, unk), rtol=1e-4, atol=1e-4)


def test_examples_change_subscripts_and_so_their_rows(small_folder: Path) -> None:
    engine = cpmbee.Engine.from_pretrained(small_folder, num_threads=1)
    engine.generate({"input": "<option_9>", "<ans>": ""}, EXAMPLES[1:2], max_new_tokens=2)
    one = engine.cache_usage.kept
    engine.generate({"input": "<option_8>", "<ans>": ""}, EXAMPLES[1:2], max_new_tokens=2)
    assert engine.cache_usage.kept == one  # equal arrays, though the text of the request differs
    engine.generate({"input": "a", "<ans>": ""}, EXAMPLES[1:2], max_new_tokens=2)
    assert engine.cache_usage.kept == 2 * one
