"""What every search shares: the columns it may choose from, the step from a chosen token to the next one to feed.

A search belongs to one request. It says which sequences are alive, is shown the logits of their last tokens, and
decides how they go on; it never sees the model, the cache or other requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cpmbee.errors import InferenceError
from cpmbee.generation_config import GenerationConfig
from cpmbee.logits import select
from cpmbee.sequence import Sequence
from cpmbee.token_space import TokenSpace

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
NO_TOKENS: Int32 = np.empty(0, np.int32)


@dataclass(frozen=True)
class Hypothesis:
    """One way to write all answers.

    Attributes:
        written: chosen tokens, ends of answers included, each with the index of its answer.
        score: mean log-probability.
    """

    written: tuple[tuple[int, int], ...]
    score: float


class Search(ABC):
    """One request's search for its answers.

    Attributes:
        sequences: those to go on with, each with its next token set; empty once the search is over.
    """

    def __init__(self, space: TokenSpace, config: GenerationConfig) -> None:
        self.space = space
        self.config = config
        self.sequences: list[Sequence] = []

    @abstractmethod
    def advance(self, logits: Float32, ext_begin: int) -> None:
        """Choose how each sequence goes on.

        Args:
            logits: (sequences, vocabulary + ext of all requests) of the tokens fed last; overwritten.
            ext_begin: column of this request's first extension row.
        """

    @abstractmethod
    def best(self) -> Hypothesis:
        """The result so far; final once no sequence is left."""

    @abstractmethod
    def settled(self) -> list[tuple[int, int]]:
        """(token, answer) pairs that every possible result begins with."""

    def rank(self, row: Float32, ext_begin: int, sequence: Sequence, values: Float32, ids: Int32) -> float:
        """The best candidates after ``sequence``, masked and penalized; see `cpmbee.plain.logits.select`.

        Raises:
            InferenceError: the logits are not finite.
        """
        space, penalty, penalized = self.space, self.config.repetition_penalty, NO_TOKENS
        if penalty != 1:
            window = self.config.repetition_window
            first = 0 if window is None else max(0, sequence.num_fed - window)
            penalized = sequence.fed[first : sequence.num_fed]
        normalizer = select(
            row,
            space.vocab_size,
            ext_begin,
            ext_begin + len(space.ext),
            penalized,
            penalty,
            space.forbidden,
            values,
            ids,
        )
        if normalizer - normalizer != 0 or ids[-1] < 0:
            raise InferenceError("the model computed logits that are not finite; its weights or the export are broken")
        return normalizer

    def extend(self, sequence: Sequence, token: int) -> None:
        """Write ``token``, which does not end the last answer, and set what to feed next."""
        sequence.written.append((token, sequence.answer))
        if token == self.space.eos_id:  # never fed: the next answer opens instead
            sequence.answer += 1
            sequence.position = 0
            sequence.next_id, sequence.next_sub = self.space.bos_id, 0
        else:
            sequence.position += 1
            sequence.next_id, sequence.next_sub = self.space.base(token)
        sequence.fed[sequence.num_fed] = sequence.next_id
        sequence.num_fed += 1


class SingleSearch(Search):
    """A search with one sequence that only grows; subclasses say how the next token is picked."""

    def __init__(self, space: TokenSpace, config: GenerationConfig) -> None:
        super().__init__(space, config)
        self._written: Sequence | None = None
        self._last: tuple[int, int] | None = None  # the token that ended the search and its answer

    @abstractmethod
    def pick(self, row: Float32, ext_begin: int, sequence: Sequence) -> tuple[int, float]:
        """The next token and its log-probability."""

    def advance(self, logits: Float32, ext_begin: int) -> None:  # noqa: D102
        (sequence,) = self.sequences
        self._written = sequence
        token, log_probability = self.pick(logits[0], ext_begin, sequence)
        sequence.score += log_probability
        if self.space.ends(token, sequence.answer) or len(sequence.written) + 1 == self.config.max_new_tokens:
            self._last = (token, sequence.answer)
            self.sequences = []
        else:
            self.extend(sequence, token)

    def settled(self) -> list[tuple[int, int]]:  # noqa: D102
        if self._written is None:
            return []
        pairs = self._written.written
        return pairs.copy() if self._last is None else [*pairs, self._last]

    def best(self) -> Hypothesis:  # noqa: D102
        pairs = self.settled()
        score = self._written.score / len(pairs) if self._written is not None and pairs else 0.0
        return Hypothesis(tuple(pairs), score)


class GreedySearch(SingleSearch):
    """The likeliest token at every step; the same as beam search with one beam."""

    def __init__(self, space: TokenSpace, config: GenerationConfig) -> None:
        super().__init__(space, config)
        self._values = np.empty(1, np.float32)
        self._ids = np.empty(1, np.int32)

    def pick(self, row: Float32, ext_begin: int, sequence: Sequence) -> tuple[int, float]:  # noqa: D102
        normalizer = self.rank(row, ext_begin, sequence, self._values, self._ids)
        return int(self._ids[0]), float(self._values[0]) - normalizer
