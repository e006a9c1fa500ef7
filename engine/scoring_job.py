"""One request whose given answers are scored: what is fed in which run, and what the logits say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cpmbee.cache import Rows
from cpmbee.choices import Choice, ChoiceEncoder, EncodedChoice, FedToken
from cpmbee.config import ModelConfig
from cpmbee.encoding import Prompt
from cpmbee.errors import CacheFullError, InferenceError, PromptError
from cpmbee.examples import examples_of
from cpmbee.logits import select
from cpmbee.prefill import RUN_TOKENS
from cpmbee.relation import TokenLayout
from cpmbee.row_keeper import RowHolder
from cpmbee.runner import Int32
from cpmbee.token_space import make_token_space
from cpmbee.tokenizer import Tokenizer

LOGITS_BYTES = 64 << 20  # of one run; a whole vocabulary for every token of long answers would be far more
NO_TOKENS: Int32 = np.empty(0, np.int32)


class ScoredReading(NamedTuple):
    """The next tokens of a job.

    Attributes:
        input_ids: (queries,) tokens to read.
        input_subs: (queries,) their subscripts.
        layout: all tokens they may look at, themselves last.
        slots: (keys,) cache rows of those tokens.
        scored: which queries are followed by a token of a choice.
        branches: the choice that each of the last keys belongs to; those before belong to all.
    """

    input_ids: Int32
    input_subs: Int32
    layout: TokenLayout
    slots: Int32
    scored: Int32
    branches: Int32

    def separate(self, relation: npt.NDArray[np.int16]) -> None:
        """Let no choice look at another, in the relation matrix (queries, keys) of this reading."""
        keys = len(self.branches)
        new = min(keys, len(relation))
        if new:
            block = relation[len(relation) - new :, relation.shape[1] - keys :]
            block[self.branches[keys - new :, None] != self.branches[None]] = -1


@dataclass(eq=False, kw_only=True)
class ScoringJob(RowHolder):
    """One request with its choices.

    Attributes:
        choices: encoded.
        branches: (entries,) the choice that each token of `entries` belongs to.
        entries: the tokens of all choices, one choice after the other.
        limit: how many of them are read in one run.
        log_probabilities: of the tokens of each choice so far.
    """

    choices: list[EncodedChoice]
    branches: Int32
    entries: list[FedToken]
    limit: int
    log_probabilities: list[list[float]]
    _begun: bool = False
    _done: int = 0  # entries that have been read
    _carried: list[int] = field(default_factory=list)  # rows of the last of them that a choice still needs
    _slots: Rows = field(default_factory=lambda: np.empty(0, np.int32))  # of the prompt
    _layout: TokenLayout | None = None  # of the prompt

    @property
    def answer_rows(self) -> int:
        """The most rows its choices can take at a time: those of one run, and those of one choice before it."""
        longest = max(len(choice.fed) for choice in self.choices)
        return min(len(self.entries), self.limit + longest)

    @property
    def first_queries(self) -> int:
        """Tokens of the run that reads the prompt."""
        return self.own_tokens + min(self.limit, len(self.entries))

    @property
    def most_outputs(self) -> int:
        """Logits of one run."""
        return 1 + min(self.limit, len(self.entries))

    @property
    def finished(self) -> bool:
        """Whether everything has been read."""
        return self._begun and self._done == len(self.entries)

    def next_reading(self) -> ScoredReading:
        """Take rows for the tokens of the next run, the prompt's among them in the first."""
        ids, subs = np.empty(0, np.int32), np.empty(0, np.int32)
        if not self._begun:
            ids, subs = self.own_arrays()
            self._slots = np.concatenate([*self.shared_slots(), self.rows.take_many(len(ids))])
            self._layout = self.layout(1)
            self._layout.append(self.prompt.answers[0].segment_id, 0)
        assert self._layout is not None  # noqa: S101 - the first run has set it
        end = min(self._done + self.limit, len(self.entries))
        fresh = self.entries[self._done : end]
        begin = self._done - len(self._carried)
        layout = self._layout.copy(end - begin)
        for token in self.entries[begin:end]:
            layout.append(token.segment_id, token.position)
        self._carried += self.rows.take_many(len(fresh)).tolist()
        return ScoredReading(
            input_ids=np.concatenate([ids, np.array([token.id for token in fresh], np.int32)]),
            input_subs=np.concatenate([subs, np.array([token.sub for token in fresh], np.int32)]),
            layout=layout,
            slots=np.concatenate([self._slots, np.array(self._carried, np.int32)]),
            scored=np.arange(max(len(ids) - 1, 0), len(ids) + len(fresh), dtype=np.int32),  # from the ``<s>`` on
            branches=self.branches[begin:end],
        )

    def accept(self, logits: npt.NDArray[np.float32], ext_begin: int) -> None:
        """Read the logits of the last reading, and give the rows of choices that are complete back.

        Args:
            logits: (outputs, vocabulary + ext of all requests), one row for each scored query; overwritten.
            ext_begin: column of this request's first extension row.

        Raises:
            InferenceError: the logits are not finite.
        """
        end = min(self._done + self.limit, len(self.entries))
        rows = iter(logits)
        if not self._begun:
            self._begun = True
            everybody = list(range(len(self.choices)))
            self._add(next(rows), everybody, [choice.first for choice in self.choices], ext_begin)
        for branch, token in zip(self.branches[self._done : end].tolist(), self.entries[self._done : end], strict=True):
            self._add(next(rows), [branch], [token.target], ext_begin)
        self._done = end
        kept = int((self.branches[:end] == self.branches[end]).sum()) if end < len(self.entries) else 0
        over = self._carried[: len(self._carried) - kept]
        self._carried = self._carried[len(over) :]
        self.rows.give_back(over)

    def _add(self, row: npt.NDArray[np.float32], branches: list[int], targets: list[int], ext_begin: int) -> None:
        """Add the log-probability of one token for each of some choices; ``row`` is masked as in generation."""
        space, best, best_id = self.space, np.empty(1, np.float32), np.empty(1, np.int32)
        ext_end = ext_begin + len(space.ext)
        normalizer = select(row, space.vocab_size, ext_begin, ext_end, NO_TOKENS, 1.0, space.forbidden, best, best_id)
        if normalizer - normalizer != 0:
            raise InferenceError("the model computed logits that are not finite; its weights or the export are broken")
        for branch, target in zip(branches, targets, strict=True):
            beyond = target - space.vocab_size
            column = target if beyond < 0 else ext_begin + beyond
            self.log_probabilities[branch].append(float(row[column]) - normalizer)


def make_job(
    prompt: Prompt, choices: Sequence[Choice], tokenizer: Tokenizer, model: ModelConfig, capacity: int
) -> ScoringJob:
    """Set the scoring of one request up.

    Args:
        prompt: the encoded request.
        choices: its answers.
        tokenizer: the model's.
        model: the model's configuration.
        capacity: rows of the cache.

    Raises:
        PromptError: there are no choices, or one that cannot be an answer; names it.
        TokenizeError: text with a lone ``<``; names the choice.
        CacheFullError: the prompt and one choice do not fit the cache.
    """
    if not isinstance(choices, (list, tuple)):
        raise PromptError(f"choices must be a list of answers, not {type(choices).__name__}")
    if not choices:
        raise PromptError("choices: there are none; give at least one answer to score")
    space = make_token_space(prompt, tokenizer, model)
    encoder = ChoiceEncoder(prompt, space, tokenizer)
    encoded = [encoder.encode(choice, f"choices[{i}]") for i, choice in enumerate(choices)]
    entries = [token for choice in encoded for token in choice.fed]
    needed = len(prompt) + 1 + max(len(choice.fed) for choice in encoded)
    if needed + 1 > capacity:
        raise CacheFullError(
            f"the request and its longest choice need {needed + 1} cache rows and there are {capacity}; shorten them, "
            f"or load the engine with cache_tokens={needed + 1}"
        )
    columns = space.vocab_size + len(space.ext)
    limit = max(1, min(RUN_TOKENS, LOGITS_BYTES // (4 * columns) - 1, capacity - needed))
    return ScoringJob(
        prompt=prompt,
        space=space,
        examples=examples_of(prompt),
        choices=encoded,
        branches=np.repeat(np.arange(len(encoded), dtype=np.int32), [len(choice.fed) for choice in encoded]),
        entries=entries,
        limit=limit,
        log_probabilities=[[] for _ in encoded],
    )
