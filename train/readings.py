"""The demo task "reading of a polyphone": how a character with several readings is read in a phrase.

It is asked in two forms: the reading is written out (``{"input": "银行", "question": "行"}`` -> háng), or chosen among
the character's readings, which the request then offers as ``options``. Phrases are held out whole.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_PHRASE = 8  # characters
TONE_CHANGES = "一不"  # their readings change with the next tone, and dictionaries disagree about writing it

_HELD_OUT_SHARE = 20  # one phrase in so many is held out
_LEAST_COUNT = 2  # phrases in which a reading must occur to count as one


@dataclass(frozen=True)
class Reading:
    """A polyphone in a phrase.

    Attributes:
        phrase: text that has the character once.
        character: the polyphone.
        answer: its reading there.
        readings: all readings of the character, the most frequent first.
    """

    phrase: str
    character: str
    answer: str
    readings: tuple[str, ...]

    @property
    def solved(self) -> dict[str, Any]:
        """The request that has the reading written, with its answer."""
        return {"input": self.phrase, "question": self.character, "<ans>": self.answer}

    def choice(self, rng: np.random.Generator) -> dict[str, Any]:
        """The request that offers the readings in random order, with its answer."""
        return self._offered(rng, self.character)

    def given_choice(self, rng: np.random.Generator) -> dict[str, Any]:
        """The same, but the question is the reading itself: an exercise in finding what is asked for."""
        return self._offered(rng, self.answer)

    def _offered(self, rng: np.random.Generator, question: str) -> dict[str, Any]:
        shuffled = [self.readings[number] for number in rng.permutation(len(self.readings))]
        options = {f"<option_{place}>": reading for place, reading in enumerate(shuffled)}
        answer = f"<option_{shuffled.index(self.answer)}>"
        return {"input": self.phrase, "question": question, "options": options, "<ans>": answer}


def is_held_out(phrase: str) -> bool:
    """Whether a phrase is for evaluation only: a fixed 5 %."""
    return zlib.crc32(phrase.encode()) % _HELD_OUT_SHARE == 0


def split_readings(phrases: Mapping[str, Sequence[str]]) -> tuple[tuple[Reading, ...], tuple[Reading, ...]]:
    """The polyphones to train on and those to evaluate on, in the order of the phrases.

    What readings a character has, and which is its most frequent, is counted in the training phrases only; held-out
    readings that never occur there are left out.

    Args:
        phrases: the readings of every phrase, one per character.
    """
    usable = {text: readings for text, readings in phrases.items() if len(readings) == len(text) <= MAX_PHRASE}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for text, readings in usable.items():
        if not is_held_out(text):
            for character, reading in zip(text, readings, strict=True):
                counts[character][reading] += 1
    known = {
        character: tuple(reading for reading, count in found.most_common() if count >= _LEAST_COUNT)
        for character, found in counts.items()
        if character not in TONE_CHANGES
    }
    sides: tuple[list[Reading], list[Reading]] = ([], [])
    for text, readings in usable.items():
        for character, reading in zip(text, readings, strict=True):
            choices = known.get(character, ())
            if len(choices) > 1 and reading in choices and text.count(character) == 1:
                sides[is_held_out(text)].append(Reading(text, character, reading, choices))
    return tuple(sides[0]), tuple(sides[1])


def majority_share(readings: Iterable[Reading]) -> float:
    """How often a character's most frequent reading is right: the bar that a model has to pass."""
    right = [reading.answer == reading.readings[0] for reading in readings]
    return sum(right) / len(right)
