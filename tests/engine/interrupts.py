"""Interrupts, one at every place where CPython delivers signals; ``python -m tests.engine.interrupts`` tries them all.

CPython looks for signals when a function begins, when a loop goes back, and after every call; never between a plain
lock's ``__enter__`` and the block it guards, which is what the engine relies on.
"""

from __future__ import annotations

import dis
import gc
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import cpmbee
from tests.engine.backends import TableBackend
from tests.model.factory import VOCABULARY, tiny_config

TRACED = (str(Path(cpmbee.__file__).parent), *(f"{name}.py" for name in ("threading", "contextlib", "_weakrefset")))
BACKENDS = str(Path(__file__).with_name("backends.py"))
AFTER = ("CALL", "RESUME")  # signals are looked for at the end of these, and before those jumps
BEFORE = ("JUMP_BACKWARD", "JUMP_ABSOLUTE")
REQUESTS = [{"input": text, "<ans>": {"a": "", "b": ""}} for text in ("今天", "ab")]
EXAMPLES = [{"input": "天气", "<ans>": "好"}, {"input": "b", "<ans>": "c"}]
SHORT = {"input": "a", "<ans>": ""}
CHOICES = [{"a": "天", "b": ""}, {"a": "", "b": "b"}]
_places: dict[CodeType, set[int]] = {}


def places(code: CodeType) -> set[int]:
    """Offsets of the instructions before which an interrupt may come."""
    if code not in _places:
        found, after = set(), False
        for instruction in dis.get_instructions(code):
            if after or instruction.opname.startswith(BEFORE):
                found.add(instruction.offset)
            after = instruction.opname.startswith(AFTER)
        _places[code] = found
    return _places[code]


def interrupted(call: Callable[[], object], place: int) -> bool:
    """Interrupt a call at the given place of all that it comes through; False if it ends before."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        name = frame.f_code.co_filename
        if not (name.startswith(TRACED[0]) or name.endswith(TRACED[1:])) or name == BACKENDS:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        if event == "opcode" and frame.f_lasti in places(frame.f_code):
            count += 1
            if count == place:
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


class Calls:
    """Calls to interrupt, on a model without a network.

    Attributes:
        all: each by its name.
    """

    def __init__(self) -> None:
        config = tiny_config()
        self.engine = cpmbee.Engine(TableBackend(config, cache_rows=200), cpmbee.Tokenizer(VOCABULARY))
        needed = max(self.engine.cache_rows(request, max_new_tokens=6) for request in REQUESTS)
        needed = max(needed, self.engine.cache_rows(SHORT, EXAMPLES[:1], max_new_tokens=1))
        self.narrow = cpmbee.Engine(TableBackend(config, cache_rows=needed), cpmbee.Tokenizer(VOCABULARY))
        self.all: dict[str, Callable[[], object]] = {
            "generate": lambda: self.engine.generate(REQUESTS, max_new_tokens=4),
            "generate, beams, examples": self.beams,
            "generate, new examples": self.new_examples,
            "generate, examples give way": self.examples_give_way,
            "sample": lambda: self.engine.generate(REQUESTS[0], temperature=1.0, seed=1, max_new_tokens=4),
            "stream": lambda: list(self.engine.stream(REQUESTS[0], EXAMPLES, max_new_tokens=4)),
            "stream, beams": lambda: list(self.engine.stream(REQUESTS[0], beam_size=2, max_new_tokens=4)),
            "close": self.close,
            "score": lambda: self.engine.score(REQUESTS[0], CHOICES, EXAMPLES[:1]),
            "generate, cache held by a stream": self.held,
        }
        self.expected = self.answers()

    def beams(self) -> object:
        """Several requests that share examples."""
        return self.engine.generate(REQUESTS, EXAMPLES, beam_size=2, max_new_tokens=4)

    def new_examples(self) -> object:
        """Examples that have to be read and kept."""
        self.engine._keeper.examples._leases.clear()
        return self.engine.generate(REQUESTS, EXAMPLES, max_new_tokens=4)

    def examples_give_way(self) -> object:
        """An example that is kept until the rows are needed."""
        self.narrow.generate(SHORT, EXAMPLES[:1], max_new_tokens=1)
        return self.narrow.generate(REQUESTS[0], max_new_tokens=6)

    def close(self) -> None:
        """A stream that is left early."""
        with self.engine.stream(REQUESTS[0], beam_size=2, max_new_tokens=6) as stream:
            next(stream, None)

    def held(self) -> object:
        """A call that must carry a stream on to get its rows."""
        stream = self.narrow.stream(REQUESTS[0], max_new_tokens=6)
        next(stream)
        return self.narrow.generate(REQUESTS[1], max_new_tokens=6)

    def answers(self) -> object:
        """What is written by calls that nobody interrupts; all rows are back after them."""
        results = [
            *self.engine.generate(REQUESTS, EXAMPLES, beam_size=2, max_new_tokens=6),
            self.narrow.generate(REQUESTS[0], max_new_tokens=6),
        ]
        return [(result.answer, result.score) for result in results]

    def check(self) -> str:
        """What is wrong after an interrupt; empty if nothing is."""
        answers: list[object] = []
        thread = threading.Thread(target=lambda: answers.append(self.answers()), daemon=True)
        thread.start()
        thread.join(60)
        if not answers:
            return "hangs" if thread.is_alive() else "fails"
        for engine in (self.engine, self.narrow):
            engine._pool.audit()
            if engine.cache_usage.used:
                return f"{engine.cache_usage.used} rows are lost"
        return "" if answers[0] == self.expected else "other answers"


def main() -> int:
    """Interrupt every call at every place; returns 1 if anything was wrong."""
    calls, wrong = Calls(), 0
    gc.disable()  # nothing may need it
    for name in sys.argv[1:] or calls.all:
        call = calls.all[name]
        start, place = time.perf_counter(), 1
        while interrupted(call, place):
            if fault := calls.check():
                print(f"{name}: place {place}: {fault}")
                wrong += 1
                if fault == "hangs":
                    return 1
            place += 1
        print(f"{name}: {place - 1} places, {time.perf_counter() - start:.0f} s", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
