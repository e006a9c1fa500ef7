"""Streams: the pieces are the answers, early ends return what is held."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import cpmbee
from cpmbee.folder import open_folder
from cpmbee.runner import Runner
from cpmbee.session import OrtBackend
from tests.engine.backends import WatchedBackend

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


def test_a_call_that_needs_the_rows_of_a_stream_nobody_reads_carries_it_on(engine: cpmbee.Engine) -> None:
    alone = engine.generate(REQUEST, max_new_tokens=400)
    with engine.stream(REQUEST, max_new_tokens=400) as stream:
        pieces = [next(stream)]
        assert engine.generate(REQUEST, max_new_tokens=400).answer == alone.answer
        pieces += stream
        assert stream.result.answer == alone.answer
        assert stream.result.finish_reason == alone.finish_reason
    text = "".join(piece.text for piece in pieces if piece.path == ("a",))
    assert text == alone.answer["a"]


def test_streams_read_by_a_pool_of_threads_wait_for_each_other(small_folder: Path) -> None:
    options = {"max_new_tokens": 100}
    rows = cpmbee.Engine.from_pretrained(small_folder, num_threads=1).cache_rows(REQUEST, **options)
    engine = cpmbee.Engine.from_pretrained(small_folder, num_threads=1, cache_tokens=rows + rows // 2)
    expected = engine.generate(REQUEST, **options).answer

    async def read(pool: ThreadPoolExecutor) -> object:
        loop, stream = asyncio.get_running_loop(), engine.stream(REQUEST, **options)
        while await loop.run_in_executor(pool, next, stream, None) is not None:
            pass
        return stream.result.answer

    async def read_all() -> list[object]:
        with ThreadPoolExecutor(2) as pool:  # fewer threads than streams: each step may be any thread's
            return await asyncio.wait_for(asyncio.gather(*(read(pool) for _ in range(5))), 60)

    assert asyncio.run(read_all()) == [expected] * 5
    engine._pool.audit()


def test_a_stream_whose_thread_has_ended_holds_nobody_up(engine: cpmbee.Engine) -> None:
    streams: list[cpmbee.Stream] = []

    def begin() -> None:
        streams.append(engine.stream(REQUEST, max_new_tokens=400))
        next(streams[0])

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(engine.generate, REQUEST, max_new_tokens=400).result(60).answer is not None
    streams[0].close()


def test_a_stream_that_waits_for_rows_can_be_closed_by_whoever_holds_them(engine: cpmbee.Engine) -> None:
    busy = threading.Event()
    end = threading.Event()

    def hold(step: int) -> bool:
        busy.set()
        return not end.wait(30)

    with ThreadPoolExecutor(2) as pool:
        holding = pool.submit(engine.generate, REQUEST, max_new_tokens=400, on_step=hold)
        busy.wait(10)
        waiting = engine.stream(REQUEST, max_new_tokens=400)
        reading = pool.submit(list, waiting)
        while not waiting._task.driven:
            pass
        waiting.close()
        assert waiting.result.finish_reason == "cancelled"
        assert reading.result(10) == []
        end.set()
        holding.result(30)
    assert engine.cache_usage.used == 0


def test_a_generation_inside_a_callback_of_one_that_holds_the_cache_is_told_so(engine: cpmbee.Engine) -> None:
    told: list[str] = []

    def nested(step: int) -> bool:
        try:
            engine.generate(REQUEST, max_new_tokens=400)
        except cpmbee.CacheFullError as error:
            told.append(str(error))
        return False

    engine.generate(REQUEST, max_new_tokens=400, on_step=nested)
    assert len(told) == 1
    assert "callback" in told[0]
    assert engine.generate(REQUEST, max_new_tokens=400).answer is not None


def test_two_callbacks_that_wait_for_each_other_are_told_so(small_folder: Path) -> None:
    options = {"max_new_tokens": 50}
    rows = cpmbee.Engine.from_pretrained(small_folder, num_threads=1).cache_rows(REQUEST, **options)
    engine = cpmbee.Engine.from_pretrained(small_folder, num_threads=1, cache_tokens=2 * rows)
    both, told = threading.Barrier(2), []

    def nested(step: int) -> bool:
        both.wait(30)
        try:
            engine.generate(REQUEST, **options)
        except cpmbee.CacheFullError as error:
            told.append(error)
        return False

    with ThreadPoolExecutor(2) as pool:
        for call in [pool.submit(engine.generate, REQUEST, on_step=nested, **options) for _ in range(2)]:
            call.result(60)
    assert told, "one at least, which lets the other go on"


def test_the_error_of_a_step_that_somebody_else_made_is_the_streams_own(small_folder: Path) -> None:
    backend = OrtBackend(open_folder(small_folder), num_threads=1, cache_tokens=512)
    broken: list[bool] = []

    def watch(runner: Runner) -> None:
        if broken and len(runner.logits) == 1 and runner.input_ids.shape[1] == 1:
            runner.logits[:] = np.nan

    engine = cpmbee.Engine(WatchedBackend(backend, watch), cpmbee.Tokenizer.from_file(small_folder / "vocab.txt"))
    stream = engine.stream(REQUEST, max_new_tokens=400)
    next(stream)
    broken.append(True)
    engine.generate(
        REQUEST, max_new_tokens=1 + 512 - engine.cache_rows(REQUEST, max_new_tokens=1), on_step=lambda _: False
    )
    for _ in range(2):  # every reader is told
        with pytest.raises(cpmbee.InferenceError, match="not finite"):
            list(stream)
    stream.close()
    assert list(stream) == []
    assert stream.result.finish_reason == "cancelled"


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"beam_size": 2}])
def test_a_stream_whose_first_step_fails_says_why(small_folder: Path, options: dict[str, float]) -> None:
    backend = OrtBackend(open_folder(small_folder), num_threads=1, cache_tokens=512)

    def watch(runner: Runner) -> None:
        runner.logits[:] = np.nan

    engine = cpmbee.Engine(WatchedBackend(backend, watch), cpmbee.Tokenizer.from_file(small_folder / "vocab.txt"))
    with pytest.raises(cpmbee.InferenceError, match="not finite"), engine.stream(REQUEST, **options) as stream:
        next(stream)
    assert stream.result.answer == {"a": None, "b": {"c": None, "d": None}}


def test_pieces_that_wait_are_gone_after_close(engine: cpmbee.Engine) -> None:
    stream = engine.stream(REQUEST, max_new_tokens=400)
    next(stream)
    engine.generate(REQUEST, max_new_tokens=400)  # carries the stream on: pieces wait
    stream.close()
    assert next(stream, None) is None
    assert stream.result.finish_reason in ("stop", "length")


def test_a_signal_handler_that_closes_the_stream_it_interrupts(engine: cpmbee.Engine) -> None:
    streams: list[cpmbee.Stream] = []

    def close(runner: Runner) -> None:
        streams[0].close()
        with pytest.raises(cpmbee.InferenceError, match="interrupts its own"):
            next(streams[0])

    watched = cpmbee.Engine(WatchedBackend(engine._backend, close), engine.tokenizer)
    streams.append(watched.stream(REQUEST, max_new_tokens=100))
    assert next(streams[0], None) is None
    assert streams[0].result.finish_reason == "cancelled"
    assert watched.cache_usage.used == 0


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


def test_a_callback_may_not_wait_for_a_stream_that_waits_for_it(small_folder: Path) -> None:
    options = {"max_new_tokens": 50}
    rows = cpmbee.Engine.from_pretrained(small_folder, num_threads=1).cache_rows(REQUEST, **options)
    engine = cpmbee.Engine.from_pretrained(small_folder, num_threads=1, cache_tokens=rows + 4)
    stream, told = engine.stream(REQUEST, **options), []

    def read(step: int) -> None:
        if step == 1:
            reading.append(pool.submit(list, stream))
            time.sleep(0.1)  # the reader waits for the rows of the call whose callback this is
            with pytest.raises(cpmbee.CacheFullError, match="callback"):
                next(stream)
            told.append(True)

    reading: list[Future[list[cpmbee.Piece]]] = []
    with ThreadPoolExecutor(1) as pool:
        alone = engine.generate(REQUEST, on_step=read, **options)
        reading[0].result(60)
    assert told
    assert stream.result.answer == alone.answer


def test_a_dropped_stream_is_not_carried_on_by_whoever_waits_for_its_rows(engine: cpmbee.Engine) -> None:
    streams = [engine.stream(REQUEST, max_new_tokens=400, repetition_penalty=1.1)]
    next(streams[0])
    search = streams[0]._request.search
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(engine.generate, REQUEST, max_new_tokens=400)
        while not engine._pool._bells and not waiting.done():
            pass
        streams.clear()
        assert waiting.result(60).answer is not None
    assert search.sequences, "it was not written to its end"


def test_a_signal_handler_closes_a_stream_wherever_its_reader_is(engine: cpmbee.Engine) -> None:
    streams: list[cpmbee.Stream] = []
    before = signal.signal(signal.SIGALRM, lambda *_: streams[-1].close())
    try:
        for attempt in range(150):
            streams.append(engine.stream(REQUEST, max_new_tokens=400))
            signal.setitimer(signal.ITIMER_REAL, 0.0002 * (attempt % 50 + 1))
            list(streams[-1])
            signal.setitimer(signal.ITIMER_REAL, 0)
            streams[-1].close()
            assert streams[-1].result.finish_reason in ("cancelled", "stop", "length")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert engine.cache_usage.used == 0


def test_whoever_stops_late_stops_nobody_else(engine: cpmbee.Engine) -> None:
    stream = engine.stream(REQUEST, max_new_tokens=5)
    next(stream)
    stop = stream._task._borrowed[2]  # type: ignore[index]  # as another thread's close() has it in hand
    list(stream)
    stop()
    result = engine.generate(REQUEST, max_new_tokens=5)
    assert result.finish_reason == "length"
    assert engine.score({"input": "a", "<ans>": ""}, ["天"])[0].logprob < 0
