"""Word for word: which classical character a modern one becomes, and what counting alone gets right.

IBM model 1 (Brown et al. 1993, "The Mathematics of Statistical Machine Translation", section 4.1) on the right pairs of
the training records, character by character. The model's embeddings start from it, and it is a bar beside the model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from cpmbee.bench.ccpm_data import CcpmRecord
from cpmbee.bench.ccpm_samples import PUNCTUATION

ITERATIONS = 6
COPY_PRIOR = 20.0  # weight of a character's own translation in the first iteration, others have 1
SMOOTHING = 1.0  # pairs that a modern character is thought to have had with characters never seen
UNEXPLAINED = 6e-4  # probability of a classical character from none of the modern ones
COPY_BONUS = 0.1  # in scores, for a character that the text has itself
TRANSLATED = 0.5  # in scores, how often a character comes from the text; others come from anywhere
LENGTH_RATIO = 0.3  # classical characters per modern one, roughly
MIN_LENGTH = 3.0


@dataclass(frozen=True)
class TranslationTable:
    """Probabilities of classical characters given a modern one.

    Attributes:
        modern: of each pair that was seen, one character.
        classical: of each pair.
        probability: float64 of each pair.
        line_frequency: how often each character is among those of a line, any of the four.
    """

    modern: list[str]
    classical: list[str]
    probability: NDArray[np.float64]
    line_frequency: Counter[str]

    def scorer(self) -> Callable[[str, str], float]:
        """How much likelier (log) a line is as the translation of a text than as any line."""
        table = dict(zip(zip(self.modern, self.classical, strict=True), self.probability.tolist(), strict=True))
        total = sum(self.line_frequency.values())

        def score(text: str, line: str) -> float:
            characters = _characters(text)
            length = max(MIN_LENGTH, LENGTH_RATIO * len(characters))
            result = 0.0
            for char in _characters(line):
                explained = sum(table.get((modern, char), 0.0) for modern in characters)
                explained += COPY_BONUS * (char in characters)
                anywhere = (self.line_frequency[char] + 0.5) / total
                result += math.log(TRANSLATED * explained / length / anywhere + 1 - TRANSLATED)
            return result

        return score


def translation_table(records: Sequence[CcpmRecord]) -> TranslationTable:
    """Estimate the table from the right pairs."""
    numbers: dict[tuple[str, str], int] = {}
    pairs: list[int] = []
    places: list[int] = []  # of every pair, the character of a line that it explains
    explained = 0
    for record in records:
        modern, classical = _characters(record.text), _characters(record.answer)
        for (offset, char), origin in product(enumerate(classical), modern):
            pairs.append(numbers.setdefault((origin, char), len(numbers)))
            places.append(explained + offset)
        explained += len(classical)
    pair, place = np.asarray(pairs, np.int64), np.asarray(places, np.int64)
    index: dict[str, int] = {}
    owner = np.asarray([index.setdefault(origin, len(index)) for origin, _ in numbers], np.int64)

    def normalized(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        return counts / (np.bincount(owner, counts)[owner] + SMOOTHING)

    probability = normalized(np.asarray([COPY_PRIOR if origin == char else 1.0 for origin, char in numbers]))
    for _ in range(ITERATIONS):
        weight = probability[pair]
        share = weight / (np.bincount(place, weight) + UNEXPLAINED)[place]
        probability = normalized(np.bincount(pair, share, len(numbers)).astype(np.float64))
    frequency = Counter(char for record in records for line in record.lines for char in _characters(line))
    return TranslationTable([m for m, _ in numbers], [c for _, c in numbers], probability, frequency)


def overlap_scorer(records: Sequence[CcpmRecord]) -> Callable[[str, str], float]:
    """How many characters of a line the text has, each counted by its inverse frequency."""
    texts = [text for record in records for text in (record.text, *record.lines)]
    frequency = Counter(char for text in texts for char in _characters(text))

    def score(text: str, line: str) -> float:
        shared = set(_characters(line)).intersection(_characters(text))
        return sum(math.log(len(texts) / (1 + frequency[char])) for char in shared)

    return score


def accuracy(score: Callable[[str, str], float], records: Sequence[CcpmRecord]) -> float:
    """Share of records whose right line scores highest."""
    right = 0
    for record in records:
        scores = [score(record.text, line) for line in record.lines]
        right += scores.index(max(scores)) == record.right
    return right / len(records)


def _characters(text: str) -> list[str]:
    """The characters of a text, each once, in order."""
    return [char for char in dict.fromkeys(text) if char not in PUNCTUATION]
