"""Answers as they are written: pieces of text that will not change any more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

from cpmbee.answers import AnswerWriter
from cpmbee.errors import InferenceError
from cpmbee.request import Request
from cpmbee.results import GenerationResult, Piece
from cpmbee.task import Task


class Stream(Iterator[Piece]):
    """Pieces of the answers of one request, in order; ends when the answers do.

    Any thread may read it, another one each time. Close it (from any thread), or leave its ``with`` block, to stop
    early; the rows it holds are returned then, and also when nothing refers to it any more. While nobody reads it, a
    call that needs its rows carries it on; what is written then is kept until it is read.
    """

    def __init__(
        self, request: Request, writer: AnswerWriter, task: Task, result: Callable[[Request], GenerationResult]
    ) -> None:
        self._request = request
        self._writer = writer
        self._task = task
        self._make_result = result
        self._result: GenerationResult | None = None
        self._collected: tuple[int, tuple[Piece, ...]] = (0, ())  # settled tokens, and pieces that nobody has read
        self._over = False

    def __next__(self) -> Piece:
        while not self._over:
            if pieces := self._task.inspect(self._collect):
                return pieces[0]
            if not self._task.advance():
                pieces = self._task.inspect(self._collect)  # others may have made steps meanwhile
                self._over = not pieces
                if pieces:
                    return pieces[0]
        raise StopIteration

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
            if not self._over:
                raise InferenceError("the stream has not ended: read it to its end, or close it")
            self._result = self._task.inspect(lambda: self._make_result(self._request))
        return self._result

    def close(self) -> None:
        """Stop; the result is what has been written so far."""
        self._over = True
        self._task.cancel()

    def _collect(self) -> tuple[Piece, ...]:
        """Pieces of all tokens that will not change any more, whoever made the steps; the first counts as read."""
        sent, pieces = self._collected
        new = self._request.search.settled()[sent:]
        for answer, pairs in groupby(new, key=lambda pair: pair[1]):
            text = self._writer.text([token for token, _ in pairs])
            if text:
                pieces = (*pieces, Piece(self._writer.path(answer), text))
        self._collected = (sent + len(new), pieces[1:])  # in one go, so that an interrupt repeats nothing
        return pieces
