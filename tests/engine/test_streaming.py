"""Streams: the pieces are the answers, early ends return what is held."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import cpmbee

REQUEST = {"input": "今天<option_0>天气", "x": "☃", "<ans>": {"a": "", "b": {"c": "", "d": ""}}}
WAYS = [{}, {"beam_size": 3}, {"beam_size": 4, "repetition_penalty": 1.5}, {"temperature": 2.0, "seed": 7}]


@pytest.fixture(scope="module")
def engine(small_folder: Path) -> cpmbee.Engine:
    return cpmbee.Engine.from_pretrained(small_folder, num_threads=1, cache_tokens=512)


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("length", [1, 2, 7, 60])
def test_pieces_joined_are_the_answers(engine: cpmbee.Engine, options, length) -> None:  # type: ignore[no-untyped-def]
    stream = engine.stream(REQUEST, max_new_tokens=length, **options)
    texts: dict[tuple[str, ...], str] = {}
    for piece in stream:
        assert piece.text
        texts[piece.path] = texts.get(piece.path, "") + piece.text
    result = engine.generate(REQUEST, max_new_tokens=length, **options)
    assert stream.result.answer == result.answer
    assert stream.result.finish_reason == result.finish_reason
    flat = {("a",): result.answer["a"], ("b", "c"): result.answer["b"]["c"], ("b", "d"): result.answer["b"]["d"]}
    assert texts == {path: text for path, text in flat.items() if text}


def test_greedy_pieces_come_one_by_one(engine: cpmbee.Engine) -> None:
    stream = engine.stream({"input": "a", "<ans>": ""}, max_new_tokens=6)
    piece = next(stream)
    assert piece.path == ()
    assert engine.cache_usage.used > 0
    with pytest.raises(RuntimeError, match="has not ended"):
        _ = stream.result
    stream.close()
    assert stream.result.finish_reason == "cancelled"
    assert stream.result.answer == piece.text
    assert list(stream) == []
    assert engine.cache_usage.used == 0


def test_left_streams_return_their_rows(engine: cpmbee.Engine) -> None:
    with engine.stream(REQUEST, beam_size=2, max_new_tokens=40) as stream:
        next(stream, None)
    assert engine.cache_usage.used == 0
    gc.disable()  # the rows must not wait for the garbage collector
    try:
        stream = engine.stream(REQUEST, max_new_tokens=40)
        next(stream)
        assert engine.cache_usage.used > 0
        del stream
        assert engine.cache_usage.used == 0
    finally:
        gc.enable()
    never_begun = engine.stream(REQUEST)
    never_begun.close()
    assert never_begun.result.finish_reason == "cancelled"
    assert never_begun.result.answer == {"a": None, "b": {"c": None, "d": None}}


def test_an_unfinished_stream_that_holds_the_cache_is_an_error_not_a_deadlock(engine: cpmbee.Engine) -> None:
    with engine.stream(REQUEST, max_new_tokens=400) as stream:
        next(stream)
        with pytest.raises(cpmbee.CacheFullError, match="close the streams"):
            engine.generate(REQUEST, max_new_tokens=400)
    assert engine.generate(REQUEST, max_new_tokens=400).answer is not None


def test_a_stream_can_be_closed_from_another_thread(engine: cpmbee.Engine) -> None:
    for _ in range(5):
        stream = engine.stream(REQUEST, beam_size=2, max_new_tokens=100)
        begun = threading.Event()

        def read(stream: cpmbee.Stream = stream, begun: threading.Event = begun) -> list[cpmbee.Piece]:
            begun.set()
            return list(stream)

        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read)
            begun.wait(10)
            stream.close()
            reading.result(10)
        assert stream.result.finish_reason in ("cancelled", "stop", "length")
        assert engine.cache_usage.used == 0
