"""From loading to unloading: what a fork, a signal, a cancelled prompt and the end of an engine do."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest

import cpmbee
from cpmbee.request import make_request
from cpmbee.scheduler import Decoding
from tests.engine.backends import WatchedBackend
from tests.engine.memory import resident_bytes

REQUEST = {"input": "今天天气真好", "<ans>": ""}


@pytest.fixture(scope="module")
def engine(small_folder: Path) -> cpmbee.Engine:
    return cpmbee.Engine.from_pretrained(small_folder, num_threads=2, cache_tokens=30000)


def test_deleting_an_engine_frees_it_at_once(small_folder: Path) -> None:
    engine = cpmbee.Engine.from_pretrained(small_folder, num_threads=3)
    engine.generate(REQUEST, max_new_tokens=3)
    list(engine.stream(REQUEST, max_new_tokens=3))
    engine.score(REQUEST, ["天"])
    session, backend = weakref.ref(engine._backend._session), weakref.ref(engine._backend)  # type: ignore[attr-defined]
    gc.collect()
    gc.disable()
    try:
        del engine
        assert session() is None
        assert backend() is None
    finally:
        gc.enable()


def test_close_ends_what_is_not_over_and_says_so(small_folder: Path) -> None:
    with cpmbee.Engine.from_pretrained(small_folder, num_threads=1) as engine:
        stream = engine.stream(REQUEST, max_new_tokens=50)
        next(stream)
        session = weakref.ref(engine._backend._session)  # type: ignore[attr-defined]
    assert session() is None
    with pytest.raises(cpmbee.InferenceError, match="closed"):
        list(stream)
    stream.close()
    assert stream.result.finish_reason == "cancelled"
    with pytest.raises(cpmbee.InferenceError, match="closed"):
        engine.generate(REQUEST)
    engine.close()


def test_closing_while_others_generate_gives_them_one_error(small_folder: Path) -> None:
    for _ in range(20):
        engine = cpmbee.Engine.from_pretrained(small_folder, num_threads=1)
        begun, failures = threading.Barrier(4), []

        def work(engine: cpmbee.Engine = engine, begun: threading.Barrier = begun, failures: list = failures) -> None:  # type: ignore[type-arg]
            begun.wait(30)
            try:
                for _ in range(10000):
                    engine.generate(REQUEST, max_new_tokens=3)
            except BaseException as caught:
                failures.append(caught)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        begun.wait(30)
        engine.close()
        for thread in threads:
            thread.join(60)
        assert [(type(error), str(error)) for error in failures] == [
            (cpmbee.InferenceError, "the engine is closed; load it again")
        ] * 3
        assert not engine._backend._idle  # type: ignore[attr-defined]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_loading_again_and_again_takes_no_more_memory(small_folder: Path) -> None:
    def load() -> None:
        cpmbee.Engine.from_pretrained(small_folder, num_threads=2).generate(REQUEST, max_new_tokens=2)

    gc.disable()
    try:
        for _ in range(10):
            load()
        before = resident_bytes(), len(os.listdir("/proc/self/task"))
        for _ in range(30):
            load()
        assert resident_bytes() - before[0] < 24 << 20
        assert len(os.listdir("/proc/self/task")) == before[1]
    finally:
        gc.enable()


FORKING = """
import os, sys, threading, time
import cpmbee
engine = cpmbee.Engine.from_pretrained(sys.argv[1], num_threads=2)
request = {"input": "今天天气真好" * 20, "<ans>": ""}
stream = engine.stream(request, max_new_tokens=50)
next(stream)
def work():
    while True: engine.generate(request, max_new_tokens=5)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
for _ in range(8):
    pid = os.fork()
    if not pid:
        calls = [lambda: engine.generate(request), lambda: engine.score(request, ["a"]), lambda: next(stream),
                 lambda: stream.close(), lambda: engine.cache_usage, lambda: next(engine.stream(request))]
        engine.close()  # nothing of the child's to give back, and no wait for ever
        told = 0
        for call in calls:
            try: call()
            except cpmbee.InferenceError as error: told += "forked" in str(error)
        again = cpmbee.Engine.from_pretrained(sys.argv[1], num_threads=2)  # one of the child's own works
        told += again.generate(request, max_new_tokens=2).usage.completion_tokens > 0
        del engine, stream, again
        sys.exit(0 if told == 7 else told + 100)  # and the child ends by itself
    for _ in range(600):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended: break
        time.sleep(0.1)
    else:
        os.kill(pid, 9); print("hangs"); os._exit(1)
    if status: print("status", status); os._exit(1)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
def test_a_forked_child_is_told_and_can_load_its_own(small_folder: Path) -> None:
    command = [sys.executable, "-c", FORKING, str(small_folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]


class SoftTimeLimit(Exception):  # noqa: N818 - as a task queue names it
    """As task queues raise it in a signal handler."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs interval timers")
@pytest.mark.parametrize("kind", [SoftTimeLimit, RuntimeError, ValueError, MemoryError])
def test_the_exception_of_a_signal_handler_comes_through(engine: cpmbee.Engine, kind: type[Exception]) -> None:
    def limit(*_: object) -> None:
        raise kind("time is up")

    def generate_until_stopped() -> None:
        for _ in range(1000):
            engine.generate({"input": "今天天气" * 300, "<ans>": ""}, max_new_tokens=2)

    before = signal.signal(signal.SIGALRM, limit)
    try:
        for delay in (0.005, 0.02, 0.05):
            signal.setitimer(signal.ITIMER_REAL, delay)
            with pytest.raises(kind, match="time is up") as caught:
                generate_until_stopped()
            assert not isinstance(caught.value, cpmbee.CpmBeeError)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert engine.generate(REQUEST, max_new_tokens=2).answer is not None
    assert engine.cache_usage.used == 0


def test_closing_a_stream_ends_the_run_that_reads_its_prompt(engine: cpmbee.Engine) -> None:
    """Not a matter of time: without that the prompt would be read to its end, and give a first token."""
    for attempt in range(20):
        stream = engine.stream({"input": "今天天气" * 1500, "<ans>": ""}, max_new_tokens=2)
        reader = threading.Thread(target=lambda stream=stream: list(stream))
        reader.start()
        while stream._task._borrowed is None:  # type: ignore[attr-defined]
            time.sleep(0.001)
        time.sleep(0.02 * attempt)
        stream.close()
        reader.join(60)
        assert engine.cache_usage.used == 0
        if stream.result.finish_reason == "cancelled" and not stream.result.usage.completion_tokens:
            break
    else:
        pytest.fail("no run was ended early")
    assert engine.generate(REQUEST, max_new_tokens=3).answer is not None


def test_cancelling_is_noticed_between_the_runs_of_a_batch(engine: cpmbee.Engine) -> None:
    runs: list[int] = []
    requests = [{"input": "今天天气" * (100 * i + 300), "<ans>": ""} for i in range(5)]

    def watch(runner: object) -> None:
        runs.append(1)
        task.cancel()

    watched = cpmbee.Engine(WatchedBackend(engine._backend, watch), engine.tokenizer)
    made = [
        make_request(watched.encode(item), watched.tokenizer, watched.config, watched.generation_config)
        for item in requests
    ]
    task = Decoding(watched._backend, watched._pool, watched._keeper, made)
    task.complete()
    assert len(runs) == 1
    assert watched.cache_usage.used == 0


def test_no_memory_for_a_relation_is_one_line(engine: cpmbee.Engine) -> None:
    with engine._backend.runner() as runner:
        with pytest.raises(cpmbee.InferenceError, match="no memory to read 1073741824 tokens of 1 prompts"):
            runner.reshape(1, 1 << 30, 1 << 30, 0)
        runner.reshape(1, 1, 1, 0)
    assert engine.generate(REQUEST, max_new_tokens=2).answer is not None
