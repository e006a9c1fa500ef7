"""Many requests, some of which may be at fault: each gets its answer, or says what is wrong with it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any, TextIO

from cpmbee.encoding import Data
from cpmbee.engine import Engine
from cpmbee.errors import CacheFullError, CpmBeeError, InferenceError, PromptError, TokenizeError
from cpmbee.request_file import Entry
from cpmbee.results import GenerationResult
from cpmbee.streaming import Stream

FAULTS = (PromptError, TokenizeError, CacheFullError, InferenceError)  # of a request; others are of the whole run


class ManyRequests:
    """Answers the requests of an input with one set of examples and options, as if they were of one call.

    Attributes:
        done: how many have been answered or refused.
        failed: how many of them have been refused.
    """

    def __init__(self, engine: Engine, examples: Sequence[Data], options: dict[str, Any]) -> None:
        self._engine = engine
        self._examples = examples
        self._options = options
        self._first_failure = ""
        self._repeats: Counter[int] = Counter()
        self.done = 0
        self.failed = 0

    def records(self, entries: Sequence[Entry]) -> list[dict[str, Any]]:
        """What is written for requests that run together: the fields of a result, or ``error`` and ``line``."""
        good = [entry.data for entry in entries if entry.data is not None]
        outcomes = iter(self._generate(good))
        records = []
        for entry in entries:
            outcome = entry.error if entry.data is None else next(outcomes)
            if isinstance(outcome, str):
                self._note(entry, outcome)
            records.append(as_record(entry, outcome))
        self.done += len(entries)
        return records

    def stream(self, entry: Entry, out: TextIO) -> None:
        """Write the text of one request's answers as it comes; what is wrong goes to standard error."""
        self.done += 1
        try:
            if entry.data is None:
                raise PromptError(entry.error)
            with self._engine.stream(entry.data, self._examples, **self._options) as stream:
                write_pieces(stream, out)
        except FAULTS as error:
            self._note(entry, str(error))
            print(f"cpmbee: {entry.located(str(error))}", file=sys.stderr)

    def check(self) -> None:
        """Raise PromptError if a request failed; says why the first one did, and how many."""
        if self.failed:
            raise PromptError(f"{self._first_failure}; {self.failed} of {self.done} requests failed")

    def _note(self, entry: Entry, error: str) -> None:
        self._first_failure = self._first_failure or entry.located(error)
        self.failed += 1

    def _generate(self, requests: list[Data]) -> list[GenerationResult | str]:
        """A result for each request, or what is wrong with it."""
        outcomes: dict[int, GenerationResult | str] = {}
        left = list(range(len(requests)))
        while left:
            counted = _CountedOn(self._repeats)
            try:
                results = self._engine.generate(
                    [requests[i] for i in left], self._examples, repeats=counted, **self._options
                )
            except FAULTS as error:
                if error.request is not None:
                    outcomes[left.pop(error.request)] = _reason(error)
                elif len(left) == 1:
                    outcomes[left.pop()] = str(error)
                else:  # the run failed, whichever request made it
                    outcomes.update((i, self._generate([requests[i]])[0]) for i in left)
                    break
            else:
                outcomes.update(zip(left, results, strict=True))
                dict.update(self._repeats, counted)
                break
        return [outcomes[i] for i in range(len(requests))]


class _CountedOn(Counter[int]):
    """Counts that go on from others, which stay as they are: a call that fails has counted nothing."""

    def __init__(self, before: Counter[int]) -> None:
        super().__init__()
        self._before = before

    def __missing__(self, key: int) -> int:
        return self._before[key]


def as_record(entry: Entry, outcome: GenerationResult | str) -> dict[str, Any]:
    """What is written for a request: its ``id``, and the fields of its result or ``error`` and ``line``."""
    record: dict[str, Any] = {} if entry.id is None else {"id": entry.id}
    if isinstance(outcome, GenerationResult):
        return record | asdict(outcome)
    return record | {"error": outcome} | ({} if entry.line is None else {"line": entry.line})


def write_pieces(stream: Stream, out: TextIO) -> None:
    """Write the text of answers as it comes, and a line end; of several answers each begins a line with its path."""
    begun = False
    try:
        for path, pieces in groupby(stream, key=lambda piece: piece.path):
            out.write("\n" * begun + (f"{'.'.join(path)}: " if path else ""))
            begun = True
            for piece in pieces:
                out.write(piece.text)
                out.flush()
    except FAULTS:
        out.write("\n" * begun)
        raise
    out.write("\n")
    out.flush()


def _reason(error: CpmBeeError) -> str:
    """The message without the place in the call, which the caller of the command does not know."""
    return str(error).removeprefix(f"request {error.request}: ")
