"""Ctrl-C at any line: rows are never given to two, and none is lost for the requests after it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

import cpmbee
from tests.engine.backends import TableBackend
from tests.model.factory import VOCABULARY, tiny_config

REQUESTS = [{"input": text, "<ans>": {"a": "", "b": ""}} for text in ("今天", "ab")]
EXAMPLES = [{"input": "天气", "<ans>": "好"}, {"input": "b", "<ans>": "c"}]
BOOK_KEEPING = ("cache.py", "examples.py", "row_keeper.py", "scheduler.py", "step_batch.py", "scoring.py")
STRIDE = 5  # of the lines that are interrupted, one after the other


def interrupted(call: Callable[[], object], line: int) -> bool:
    """Interrupt a call at the given line of all that do book-keeping; False if it ends before."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.endswith(BOOK_KEEPING):
            return None
        if event == "line":
            count += 1
            if count == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.parametrize("what", ["generate", "score"])
def test_an_interrupt_at_any_line(what: str) -> None:
    engine = cpmbee.Engine(TableBackend(tiny_config(), cache_rows=200), cpmbee.Tokenizer(VOCABULARY))

    def call() -> object:
        if what == "score":
            return engine.score(REQUESTS[0], [{"a": "天", "b": ""}, {"a": "", "b": "b"}], EXAMPLES[:1])
        return engine.generate(REQUESTS, EXAMPLES, beam_size=2, max_new_tokens=6)

    def answers() -> object:
        return [result.answer for result in engine.generate(REQUESTS, EXAMPLES, beam_size=2, max_new_tokens=6)]

    expected = answers()
    kept = engine.cache_usage.kept
    line = 1
    while interrupted(call, line):
        assert answers() == expected
        assert (engine.cache_usage.used, engine.cache_usage.kept) == (0, kept)
        free = engine._pool._free
        assert len(set(free)) == len(free)
        line += STRIDE
    assert line > 200
