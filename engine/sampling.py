"""Sampling: draw each token at random from the likeliest ones, repeatably if a seed is given."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cpmbee.generation_config import GenerationConfig
from cpmbee.search import Float32, SingleSearch
from cpmbee.sequence import Sequence
from cpmbee.token_space import TokenSpace

NEGLIGIBLE = 40.0  # weights below exp(-40) of the largest are 0: all of a vocabulary together stay under 1e-12


class SamplingSearch(SingleSearch):
    """Temperature, then the ``top_k`` likeliest, then of those the fewest that reach ``top_p``.

    Each request draws from a generator of its own, so a result depends neither on the other requests of a batch nor on
    how they finish.

    Args:
        space: what the logits mean.
        config: the options.
        entropy: what the generator is made from; None for what the system has.
    """

    def __init__(self, space: TokenSpace, config: GenerationConfig, entropy: list[int] | None) -> None:
        super().__init__(space, config)
        self._random = np.random.default_rng(entropy)
        self._values = np.empty(1, np.float32)
        self._ids = np.empty(1, np.int32)

    def pick(self, row: Float32, ext_begin: int, sequence: Sequence) -> tuple[int, float]:  # noqa: D102
        normalizer = self.rank(row, ext_begin, sequence, self._values, self._ids)
        own = row[: self.space.vocab_size]
        if self.space.ext:
            own = np.concatenate((own, row[ext_begin : ext_begin + len(self.space.ext)]))
        if self.space.forbidden >= 0:
            own[self.space.forbidden] = -np.inf  # a mask of -10,000 would not survive a high temperature
        tokens, weights = truncated(own, self.config.temperature or 1.0, self.config.top_k, self.config.top_p)
        heap = np.cumsum(weights)
        drawn = int(np.searchsorted(heap, self._random.random() * heap[-1], "right"))
        token = int(tokens[min(drawn, len(tokens) - 1)])
        return token, float(own[token]) - normalizer


def truncated(
    logits: Float32, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The tokens that may be drawn, and their weights (not normalized).

    Args:
        logits: (tokens,) of one position.
        temperature: divides the logits.
        top_k: keep that many, ties to the lower token; None for all.
        top_p: keep the fewest whose share of what ``top_k`` left reaches it; None for all.
    """
    largest = logits.max()
    (tokens,) = np.nonzero(logits >= largest - NEGLIGIBLE * temperature)
    if top_k is not None and top_k < len(tokens):
        kth = np.partition(logits[tokens], -top_k)[-top_k]
        tokens = tokens[logits[tokens] >= kth]  # more than k where tokens tie: a stable sort of few settles that
        tokens = tokens[np.argsort(-logits[tokens], kind="stable")[:top_k]]
    weights = np.exp((logits[tokens].astype(np.float64) - largest) / temperature)
    if top_p is not None and top_p < 1:
        total = weights.sum()
        # Tokens below this weight together stay under 1 - top_p: none of them can be needed, and most of the sort goes.
        likely = weights >= (1 - top_p) * total / len(weights)
        tokens, weights = tokens[likely], weights[likely]
        order = np.argsort(-logits[tokens], kind="stable")
        tokens, weights = tokens[order], weights[order]
        keep = int(np.searchsorted(np.cumsum(weights), top_p * total)) + 1
        tokens, weights = tokens[:keep], weights[:keep]
    return tokens, weights
