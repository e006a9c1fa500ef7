"""Threads, errors in the middle, many generations in a row: rows always come back, answers never mix."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import cpmbee
from cpmbee.runner import Runner
from tests.engine.backends import TableBackend, WatchedBackend
from tests.engine.memory import resident_bytes
from tests.model.factory import VOCABULARY, tiny_config

REQUESTS = [{"input": "今天天气真好"[: i % 7] + "ab" * i, "<ans>": {"a": "", "b": ""}} for i in range(24)]
EXAMPLES = [{"input": "天气", "<ans>": "好"}]
TOKENIZER = cpmbee.Tokenizer(VOCABULARY)


def test_threads_get_their_own_answers(small_folder: Path) -> None:
    engine = cpmbee.Engine.from_pretrained(small_folder, num_threads=1, cache_tokens=200)  # too few for all at a time
    options = [{"beam_size": 1 + i % 3, "max_new_tokens": 10 + i % 5} for i in range(len(REQUESTS))]
    alone = [engine.generate(r, EXAMPLES, **o).answer for r, o in zip(REQUESTS, options, strict=True)]
    with ThreadPoolExecutor(4) as threads:
        together = list(
            threads.map(lambda r, o: engine.generate(r, EXAMPLES, **o).answer, REQUESTS, options, timeout=60)
        )
    assert together == alone
    assert engine.cache_usage.used == 0


def test_streams_in_threads(small_folder: Path) -> None:
    engine = cpmbee.Engine.from_pretrained(small_folder, num_threads=1, cache_tokens=400)
    alone = [engine.generate(request, max_new_tokens=15).answer for request in REQUESTS]

    def read(request: dict[str, object]) -> object:
        stream = engine.stream(request, max_new_tokens=15)
        for _ in stream:
            pass
        return stream.result.answer

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(read, REQUESTS, timeout=60)) == alone


@pytest.mark.parametrize("run", range(1, 8))
@pytest.mark.parametrize("beam_size", [1, 3])
def test_a_failing_run_returns_everything(run: int, beam_size: int) -> None:
    count = 0

    def fail(runner: Runner) -> None:
        nonlocal count
        count += 1
        if count == run:
            raise RuntimeError("broken on purpose")

    engine = cpmbee.Engine(WatchedBackend(TableBackend(tiny_config(), 300), fail), TOKENIZER)
    with pytest.raises(RuntimeError, match="on purpose"):
        engine.generate(REQUESTS[:6], EXAMPLES, beam_size=beam_size, max_new_tokens=12)
    assert engine.cache_usage.used == 0
    engine.generate({"input": "a" * 230, "<ans>": ""}, max_new_tokens=50)  # needs nearly all rows
    assert engine.cache_usage == type(engine.cache_usage)(300, 0, 0)


def test_a_failing_callback_returns_everything(small_folder: Path) -> None:
    engine = cpmbee.Engine.from_pretrained(small_folder, num_threads=1, cache_tokens=256)

    def on_step(step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(REQUESTS[:4], on_step=on_step, max_new_tokens=20)
    assert engine.cache_usage.used == 0


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_that_are_not_finite(broken: float) -> None:
    def spoil(runner: Runner) -> None:
        runner.logits[0, 0, 3] = broken

    engine = cpmbee.Engine(WatchedBackend(TableBackend(tiny_config()), spoil), TOKENIZER)
    for options in ({}, {"beam_size": 2}, {"top_k": 5}):
        with pytest.raises(cpmbee.InferenceError, match="not finite"):
            engine.generate(REQUESTS[0], **options)
    assert engine.cache_usage.used == 0


def test_fewer_possible_tokens_than_beams_need() -> None:
    def spoil(runner: Runner) -> None:
        runner.logits[:, :, 3:] = -np.inf

    engine = cpmbee.Engine(WatchedBackend(TableBackend(tiny_config()), spoil), TOKENIZER)
    with pytest.raises(cpmbee.InferenceError, match="not finite"):
        engine.generate(REQUESTS[0], beam_size=2)


def test_beams_hold_only_the_rows_they_need() -> None:
    most = 0

    def watch(runner: Runner) -> None:
        nonlocal most
        most = max(most, engine.cache_usage.used)

    engine = cpmbee.Engine(WatchedBackend(TableBackend(tiny_config(), 2048), watch), TOKENIZER)
    engine.generate(REQUESTS[0], beam_size=8, max_new_tokens=100)
    prompt = len(engine.encode(REQUESTS[0])) + 1
    assert most < prompt + 8 * 100 / 2  # beams share most of their past


def test_many_generations_leave_nothing_behind(small_folder: Path) -> None:
    engine = cpmbee.Engine.from_pretrained(small_folder, num_threads=1, cache_tokens=600)

    def round_of(count: int) -> None:
        for i in range(count):
            request = {"input": "今天天气" * (1 + i % 17), "<ans>": ""}
            engine.generate(request, EXAMPLES[: i % 2], beam_size=1 + i % 3, max_new_tokens=5 + i % 20)

    round_of(60)
    gc.collect()
    before, threads = resident_bytes(), threading.active_count()
    round_of(60)
    gc.collect()
    assert resident_bytes() - before < 4 << 20
    assert threading.active_count() == threads
    assert engine.cache_usage.used == 0
