"""Answers as they are written: pieces of text that will not change any more."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from itertools import groupby

from cpmbee.answers import AnswerWriter
from cpmbee.errors import InferenceError
from cpmbee.request import Request
from cpmbee.results import GenerationResult, Piece


class Stream(Iterator[Piece]):
    """Pieces of the answers of one request, in order; ends when the answers do.

    Close it (from any thread), or leave its ``with`` block, to stop early; the rows it holds are returned then, and
    also when nothing refers to it any more.
    """

    def __init__(
        self,
        request: Request,
        writer: AnswerWriter,
        steps: Generator[None, None, None],
        result: Callable[[Request], GenerationResult],
    ) -> None:
        self._request = request
        self._writer = writer
        self._steps = steps
        self._make_result = result
        self._result: GenerationResult | None = None
        self._sent = 0
        self._lock = threading.RLock()
        # Not a generator over ``self``: that would be a cycle, and an abandoned stream would keep its rows until the
        # garbage collector happens to run.
        self._pending: deque[Piece] = deque()

    def __next__(self) -> Piece:
        with self._lock:
            while not self._pending:
                if self._result is not None:
                    raise StopIteration
                for _ in self._steps:
                    self._pending.extend(self._new_pieces())
                    break
                else:
                    self._finish()
            return self._pending.popleft()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def result(self) -> GenerationResult:
        """The result, as `Engine.generate` gives it.

        Raises:
            InferenceError: the stream has not ended.
        """
        if self._result is None:
            raise InferenceError("the stream has not ended: read it to its end, or close it")
        return self._result

    def close(self) -> None:
        """Stop; the result is what has been written so far."""
        self._request.cancelled = True
        with self._lock:
            self._pending.clear()
            if self._result is None:
                self._finish()

    def _finish(self) -> None:
        self._steps.close()
        self._result = self._make_result(self._request)

    def _new_pieces(self) -> Iterator[Piece]:
        new = self._request.search.settled()[self._sent :]
        self._sent += len(new)
        for answer, pairs in groupby(new, key=lambda pair: pair[1]):
            text = self._writer.text([token for token, _ in pairs])
            if text:
                yield Piece(self._writer.path(answer), text)
