"""Beam search, token for token what the original implementation finds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cpmbee.errors import ConfigError
from cpmbee.generation_config import GenerationConfig
from cpmbee.search import Float32, Hypothesis, Search
from cpmbee.sequence import Sequence
from cpmbee.token_space import TokenSpace


@dataclass(frozen=True)
class _Candidate:
    sequence: Sequence
    token: int
    score: np.float32  # sum of log-probabilities, in the precision of the original


class BeamSearch(Search):
    """``beam_size`` sequences side by side, scored by the mean log-probability of their tokens.

    Scores are summed in float32 as the original does. The stop test comes before a step's candidates are added, and
    uses the 0-based step; at the last step every candidate becomes a hypothesis.
    """

    def __init__(self, space: TokenSpace, config: GenerationConfig) -> None:
        super().__init__(space, config)
        self._width = 2 * config.beam_size
        if self._width > space.vocab_size:
            raise ConfigError(f"beam_size {config.beam_size} is more than half the vocabulary ({space.vocab_size})")
        self._step = 0
        self._finished: list[Hypothesis] = []  # in the order in which they were found
        self._worst = 1e9

    def advance(self, logits: Float32, ext_begin: int) -> None:  # noqa: D102
        candidates = self._candidates(logits, ext_begin)
        step, last = self._step, self._step == self.config.max_new_tokens - 1
        self._step += 1
        if self._is_done(float(candidates[0].score), step):
            self.sequences = []
            return
        live: list[_Candidate] = []
        for candidate in candidates:
            if last or self.space.ends(candidate.token, candidate.sequence.answer):
                self._finish(candidate)
            else:
                live.append(candidate)
            if len(live) == self.config.beam_size:
                break
        self.sequences = self._grow(live)
        # Log-probabilities are never positive, so no later step can pass the test of the next one if this fails it.
        if live and self._is_done(float(live[0].score), self._step):
            self.sequences = []

    def _candidates(self, logits: Float32, ext_begin: int) -> list[_Candidate]:
        """The best continuations over all sequences, the likeliest first."""
        found: list[_Candidate] = []
        values = np.empty(self._width, np.float32)
        ids = np.empty(self._width, np.int32)
        for sequence, row in zip(self.sequences, logits, strict=True):
            normalizer = np.float32(self.rank(row, ext_begin, sequence, values, ids))
            scores = (values - normalizer) + np.float32(sequence.score)
            found += map(_Candidate, [sequence] * self._width, ids.tolist(), scores)
        found.sort(key=lambda candidate: -candidate.score)  # stable: ties keep the order of beams and tokens
        return found[: self._width]

    def _grow(self, candidates: list[_Candidate]) -> list[Sequence]:
        """Turn candidates into sequences; one that goes on once keeps its arrays, others are copied."""
        last_use = {id(candidate.sequence): i for i, candidate in enumerate(candidates)}
        grown = []
        for i, candidate in enumerate(candidates):
            parent = candidate.sequence
            sequence = parent if last_use[id(parent)] == i else parent.fork()
            grown.append(sequence)
        for sequence, candidate in zip(grown, candidates, strict=True):
            self.extend(sequence, candidate.token)
            sequence.score = float(candidate.score)
        return grown

    def _is_done(self, best_sum: float, step: int) -> bool:
        """Whether nothing that is still alive can beat the hypotheses that are kept."""
        return len(self._finished) >= self.config.beam_size and self._worst >= best_sum / step

    def _finish(self, candidate: _Candidate) -> None:
        """Keep a complete hypothesis if it is among the ``beam_size`` best."""
        sequence = candidate.sequence
        written = (*sequence.written, (candidate.token, sequence.answer))
        score = float(candidate.score) / len(written)
        full = len(self._finished) >= self.config.beam_size
        if full and score <= self._worst:
            return
        self._finished.append(Hypothesis(written, score))
        if full:
            scores = [hypothesis.score for hypothesis in self._finished]
            del self._finished[scores.index(min(scores))]
            self._worst = min(hypothesis.score for hypothesis in self._finished)
        else:
            self._worst = min(score, self._worst)

    def best(self) -> Hypothesis:  # noqa: D102
        if self._finished:
            return max(self._finished, key=lambda hypothesis: hypothesis.score)
        live = self.sequences[:1]  # cancelled before anything was complete
        if not live or not live[0].written:
            return Hypothesis((), 0.0)
        return Hypothesis(tuple(live[0].written), live[0].score / len(live[0].written))

    def settled(self) -> list[tuple[int, int]]:
        """What all live sequences and all kept hypotheses agree on."""
        if not self.sequences:
            return list(self.best().written)
        written = [tuple(sequence.written) for sequence in self.sequences]
        written += [hypothesis.written for hypothesis in self._finished]
        common = []
        for pairs in zip(*written, strict=False):
            if any(pair != pairs[0] for pair in pairs):
                break
            common.append(pairs[0])
        return common
