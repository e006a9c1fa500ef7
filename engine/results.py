"""What a generation returns: typed, immutable, and free of arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Answer: TypeAlias = "str | dict[str, Answer] | None"
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Usage:
    """Token counts of one request.

    Attributes:
        prompt_tokens: tokens of the request and of its in-context examples.
        completion_tokens: tokens of the returned answers, the ends of answers included.
    """

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timings:
    """Wall-clock seconds of one request; requests that ran together share their phases.

    Attributes:
        encode: from the dict to arrays.
        prefill: the runs that read the prompt, the first token included.
        decode: all later tokens, until this request was done.
    """

    encode: float
    prefill: float
    decode: float

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return self.encode + self.prefill + self.decode


@dataclass(frozen=True)
class GenerationResult:
    """The answers of one request.

    Attributes:
        answer: the text, or a dict shaped like the request's ``<ans>``; None for an answer that was never begun.
        score: mean log-probability of the written tokens, after the repetition penalty and before temperature.
        finish_reason: ``"stop"`` when the model ended the last answer, ``"length"`` when the budget ran out,
            ``"cancelled"`` when the caller did.
        usage: token counts.
        timings: seconds per phase.
    """

    answer: Answer
    score: float
    finish_reason: FinishReason
    usage: Usage
    timings: Timings


@dataclass(frozen=True)
class Piece:
    """A piece of an answer that will not change any more.

    Attributes:
        path: keys below ``<ans>`` of the answer it belongs to; empty when ``<ans>`` is the answer itself.
        text: the text that follows the pieces of this path so far.
    """

    path: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class CacheUsage:
    """Rows of the cache, one token each.

    Attributes:
        capacity: rows there are.
        used: rows of requests that are running.
        kept: rows of in-context examples that are kept for later requests; given up when others need them.
    """

    capacity: int
    used: int
    kept: int
