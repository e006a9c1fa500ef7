"""The demo task "simplified to traditional": a line of a poem in simplified characters, written as its author wrote it.

The right answer is the line itself; the request holds its simplified form, which a conversion table makes. Lines come
from poems without gaps, notes or rare signs. Poems are held out whole, and a held-out line that training saw in some
other poem is left out.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

PROMPT = "转繁体"
LINE_LENGTHS = (5, 7)  # characters of the lines that are kept: regular verse

_PLAIN_POEM = re.compile(r"[\u4e00-\u9fff，。？！；、：]+")
_PAUSES = re.compile(r"[，。？！；、：]")
_HELD_OUT_SHARE = 20  # one poem in so many is held out


class Conversion:
    """Longest-match conversion by a table of phrases and characters, as OpenCC does it."""

    def __init__(self, table: Mapping[str, str]) -> None:
        """``table`` maps phrases and single characters to what they become; everything else stays."""
        self._characters = {key: value for key, value in table.items() if len(key) == 1}
        self._phrases = {key: value for key, value in table.items() if len(key) > 1}
        self._longest = {  # of the phrases that begin with these two characters
            start: max(len(key) for key in keys) for start, keys in _by_start(self._phrases).items()
        }

    def __call__(self, text: str) -> str:
        """``text`` converted from left to right, the longest phrase first."""
        out: list[str] = []
        start = 0
        while start < len(text):
            end = start + 1
            for length in range(self._longest.get(text[start : start + 2], 0), 1, -1):
                if text[start : start + length] in self._phrases:
                    end = start + length
                    break
            part = text[start:end]
            out.append(self._phrases[part] if end > start + 1 else self._characters.get(part, part))
            start = end
        return "".join(out)


@dataclass(frozen=True)
class Line:
    """A line of verse.

    Attributes:
        simplified: the input of the request.
        original: the answer; as many characters.
    """

    simplified: str
    original: str

    @property
    def solved(self) -> dict[str, str]:
        """The request with its answer."""
        return {"input": self.simplified, "prompt": PROMPT, "<ans>": self.original}


def is_held_out(poem_id: str) -> bool:
    """Whether a poem is for evaluation only: a fixed 5 %."""
    return zlib.crc32(poem_id.encode()) % _HELD_OUT_SHARE == 0


def split_lines(
    poems: Iterable[tuple[str, Iterable[str]]], simplify: Conversion
) -> tuple[tuple[Line, ...], tuple[Line, ...]]:
    """The lines to train on and those to evaluate on, each line once, in the order of the poems.

    Args:
        poems: identifier and paragraphs of every poem.
        simplify: traditional to simplified.
    """
    seen: dict[str, Line] = {}
    held_out: dict[str, Line] = {}
    for identifier, paragraphs in poems:
        side = held_out if is_held_out(identifier) else seen
        for original in _lines(paragraphs):
            simplified = simplify(original)
            if len(simplified) == len(original):
                side.setdefault(simplified, Line(simplified, original))
    return tuple(seen.values()), tuple(line for text, line in held_out.items() if text not in seen)


def character_majority_share(lines: Iterable[Line], held_out: Sequence[Line]) -> float:
    """Share of held-out lines that are right when each character takes the form it has most often in ``lines``."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in lines:
        for char, original in zip(line.simplified, line.original, strict=True):
            counts[char][original] += 1
    forms = {char: found.most_common(1)[0][0] for char, found in counts.items()}
    right = ["".join(forms.get(char, char) for char in line.simplified) == line.original for line in held_out]
    return sum(right) / len(right)


def _lines(paragraphs: Iterable[str]) -> Iterator[str]:
    text = "".join(paragraphs)
    if _PLAIN_POEM.fullmatch(text):
        yield from (line for line in _PAUSES.split(text) if len(line) in LINE_LENGTHS)


def _by_start(phrases: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for phrase in phrases:
        groups.setdefault(phrase[:2], []).append(phrase)
    return groups
