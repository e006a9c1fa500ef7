"""Dialogue: the turns so far live in the request's ``input``, speakers are user symbols."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cpmbee.engine import Engine
from cpmbee.errors import ConfigError
from cpmbee.results import GenerationResult, Piece
from cpmbee.streaming import Stream
from cpmbee.tokenizer import Tokenizer

logger = logging.getLogger("cpmbee")


@dataclass(frozen=True)
class Turn:
    """One exchange.

    Attributes:
        user: what the user said.
        reply: what the model answered, as the result's answer has it: a literal ``<`` is ``<<``.
    """

    user: str
    reply: str


class Chat:
    """A conversation that remembers its turns.

    What the user says is escaped: a ``<`` in it is a plain character, never a special token.

    A conversation that outgrows the engine's cache goes on: a request leaves out as many of the oldest turns as it
    must, whole ones, so that the others, ``fields``, the new message and the reply's budget fit. ``forgotten`` says how
    many; ``turns`` keeps them all.

    Args:
        engine: runs the model.
        user: marks what the user says.
        assistant: marks what the model says.
        fields: more keys of the request, such as ``{"prompt": "..."}``; they follow ``input``.
        max_turns: how many of the last turns the model sees at most; None for as many as fit.
        **options: generation options for every reply.

    Attributes:
        turns: the conversation so far.
        forgotten: how many of the oldest turns the last request left out.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        user: str = "<用户>",
        assistant: str = "<AI>",
        fields: Mapping[str, Any] | None = None,
        max_turns: int | None = None,
        **options: Any,
    ) -> None:
        if max_turns is not None and (type(max_turns) is not int or max_turns < 0):
            raise ConfigError(f"max_turns must be None or an integer of at least 0, not {max_turns!r}")
        engine.generation_config.updated(**options)
        self.turns: list[Turn] = []
        self.forgotten = 0
        self._engine = engine
        self._user = user
        self._assistant = assistant
        self._fields = dict(fields or {})
        self._max_turns = max_turns
        self._options = options

    def send(self, text: str, **options: Any) -> GenerationResult:
        """Say something and get the reply, which becomes part of the conversation.

        Args:
            text: what the user says.
            **options: generation options for this reply only.

        Returns:
            The result; its answer is the reply.

        Raises:
            CacheFullError: the message would not fit the cache even without the turns before it.
        """
        options = {**self._options, **options}
        result = self._engine.generate(self._next_request(text, options), **options)
        self.remember(text, result)
        return result

    def stream(self, text: str, **options: Any) -> ChatStream:
        """Like `send`, piece by piece; the turn is remembered when the stream has ended or is closed."""
        options = {**self._options, **options}
        return ChatStream(self, text, self._engine.stream(self._next_request(text, options), **options))

    def reset(self) -> None:
        """Forget the conversation."""
        self.turns.clear()
        self.forgotten = 0

    def request(self, text: str, **options: Any) -> dict[str, Any]:
        """The request that asks for a reply to ``text``.

        Args:
            text: what the user says.
            **options: generation options for this reply only; its budget takes part of the cache.
        """
        return self._request(text, self._first_turn(text, {**self._options, **options}))

    def _next_request(self, text: str, options: dict[str, Any]) -> dict[str, Any]:
        first = self._first_turn(text, options)
        request = self._request(text, first)
        if first > self.forgotten:
            logger.info("the model no longer sees the %d oldest of %d turns", first, len(self.turns))
        self.forgotten = first
        return request

    def _first_turn(self, text: str, options: dict[str, Any]) -> int:
        """The first turn of a request that the cache and ``max_turns`` allow; that behind the last for none."""
        first = 0 if self._max_turns is None else max(0, len(self.turns) - self._max_turns)
        capacity = self._engine.cache_usage.capacity

        def fits(first: int) -> bool:
            return self._engine.cache_rows(self._request(text, first), **options) <= capacity

        candidates = range(first, len(self.turns))
        if not candidates or fits(first):
            return first
        return first + bisect_left(candidates, True, key=fits)

    def _request(self, text: str, first: int) -> dict[str, Any]:
        dialogue = "".join(
            f"{self._user}{Tokenizer.escape(turn.user)}{self._assistant}{turn.reply}" for turn in self.turns[first:]
        )
        return {
            "input": f"{dialogue}{self._user}{Tokenizer.escape(text)}{self._assistant}",
            **self._fields,
            "<ans>": "",
        }

    def remember(self, text: str, result: GenerationResult) -> None:
        """Make an exchange part of the conversation."""
        self.turns.append(Turn(text, result.answer if isinstance(result.answer, str) else ""))


class ChatStream(Iterator[Piece]):
    """A reply as it is written; when it ends, or is closed, the turn becomes part of the conversation."""

    def __init__(self, chat: Chat, text: str, stream: Stream) -> None:
        self._chat = chat
        self._text = text
        self._stream = stream
        self._remembered = False

    def __next__(self) -> Piece:
        try:
            return next(self._stream)
        except StopIteration:
            self.close()
            raise

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def result(self) -> GenerationResult:
        """The result, once the stream has ended."""
        return self._stream.result

    def close(self) -> None:
        """Stop; what has been written so far is the reply."""
        self._stream.close()
        if not self._remembered:
            self._remembered = True
            self._chat.remember(self._text, self._stream.result)
