"""The demo task: Chinese numerals written as digits and digits written as Chinese numerals, 0 to 99,999,999.

The data is made here, so it has no licence but the project's, and every answer can be checked. Rules of writing:

- 二 everywhere, never 两 (reading accepts 两 before 百, 千 and 万, as people write it).
- A leading 一十 is written 十: 十五, 十万; inside a numeral it stays: 一百一十五.
- A run of zeros between two digits is one 零: 三千零五, 一万零三十. A myriad group that ends in zeros needs none
  before thousands: 二十万一千.
- Digits have no separators and no leading zeros.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Direction = Literal["digits", "chinese"]

DIRECTIONS: tuple[Direction, ...] = ("digits", "chinese")
PROMPTS: dict[Direction, str] = {"digits": "写成数字", "chinese": "写成汉字"}
LIMIT = 100_000_000  # first number that is not in the task
CHARACTERS = "零一二三四五六七八九十百千万两"

_DIGITS = "零一二三四五六七八九"
_UNITS = ("", "十", "百", "千")
_UNIT_VALUES = {"十": 10, "百": 100, "千": 1000}
_DIGIT_VALUES = {**{char: value for value, char in enumerate(_DIGITS)}, "两": 2}
_ALWAYS_SEEN = 100  # numbers below are too few to keep some from the model
_HELD_OUT_SHARE = 20  # one number in so many is held out


def to_chinese(number: int) -> str:
    """Write ``number`` as a Chinese numeral by the rules of this module.

    Raises:
        ValueError: the number is outside 0..99,999,999.
    """
    if not 0 <= number < LIMIT:
        raise ValueError(f"{number} is outside 0..{LIMIT - 1}")
    myriads, rest = divmod(number, 10_000)
    if not myriads:
        text = _group(rest) or "零"
    else:
        gap = "零" if 0 < rest < 1000 else ""
        text = f"{_group(myriads)}万{gap}{_group(rest)}"
    return text[1:] if text.startswith("一十") else text


def from_chinese(text: str) -> int:
    """Read a Chinese numeral; the inverse of `to_chinese`, and it accepts 两 for 二 before 百, 千 and 万.

    Raises:
        ValueError: the text is not a numeral of this task.
    """
    total = group = 0
    digit: int | None = None
    for char in text:
        if char in _DIGIT_VALUES:
            digit = _DIGIT_VALUES[char]
        elif char in _UNIT_VALUES:
            group += (1 if digit is None else digit) * _UNIT_VALUES[char]
            digit = None
        elif char == "万":
            total = (group + (digit or 0)) * 10_000
            group, digit = 0, None
        else:
            raise ValueError(f"{text!r} is not a numeral: {char!r}")
    number = total + group + (digit or 0)
    if not text or number >= LIMIT or text not in (to_chinese(number), colloquial(to_chinese(number))):
        raise ValueError(f"{text!r} is not a numeral as this task writes it")
    return number


def colloquial(numeral: str) -> str:
    """The numeral as it is often spoken: 两 for 二 before 百 and 千, and before 万 where nothing precedes it."""
    chars = list(numeral)
    for i, char in enumerate(chars[:-1]):
        if char == "二" and (chars[i + 1] in ("百", "千") or (i == 0 and chars[1] == "万")):
            chars[i] = "两"
    return "".join(chars)


def is_held_out(number: int) -> bool:
    """Whether ``number`` belongs to the evaluation set, in both directions: a fixed 5 % of the numbers from 100 on."""
    return number >= _ALWAYS_SEEN and zlib.crc32(str(number).encode()) % _HELD_OUT_SHARE == 0


@dataclass(frozen=True)
class Example:
    """One request and its answer.

    Attributes:
        number: the number that both sides stand for.
        direction: what the answer is written in.
        source: the input of the request.
        answer: the text that the model should write.
    """

    number: int
    direction: Direction
    source: str
    answer: str

    @property
    def request(self) -> dict[str, str]:
        """The request as a user would write it, with nothing under ``<ans>``."""
        return {"input": self.source, "prompt": PROMPTS[self.direction], "<ans>": ""}

    @property
    def solved(self) -> dict[str, str]:
        """The request with its answer, as training wants it."""
        return {**self.request, "<ans>": self.answer}


def make_example(number: int, direction: Direction, spoken: bool = False) -> Example:
    """The request for ``number``; ``spoken`` writes 两 where people say it (only when the input is Chinese)."""
    numeral, digits = to_chinese(number), str(number)
    if direction == "chinese":
        return Example(number, direction, digits, numeral)
    return Example(number, direction, colloquial(numeral) if spoken else numeral, digits)


def random_number(rng: np.random.Generator) -> int:
    """A number of 1 to 8 digits, long ones more often, half of them rich in zeros (where the rules are)."""
    weights = np.array([1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0])
    length = 1 + int(rng.choice(8, p=weights / weights.sum()))
    digits = rng.integers(0, 10, length)
    if rng.random() < 0.5:
        digits[rng.random(length) < rng.random()] = 0
    if length > 1 and digits[0] == 0:
        digits[0] = rng.integers(1, 10)
    return int("".join(map(str, digits)))


def examples(
    rng: np.random.Generator, held_out: bool, directions: Sequence[Direction] = DIRECTIONS
) -> Iterator[Example]:
    """An endless stream of examples, the directions in turn, all or none of them held out.

    Args:
        rng: source of numbers; equal states give equal streams.
        held_out: which side of the split the numbers come from.
        directions: what the answers are written in.
    """
    while True:
        for direction in directions:
            number = random_number(rng)
            while is_held_out(number) is not held_out:
                number = random_number(rng)
            yield make_example(number, direction, spoken=bool(rng.random() < 0.25))


def held_out_examples(rng: np.random.Generator, count: int) -> list[Example]:
    """``count`` different held-out requests per direction, directions in turn."""
    distinct: dict[tuple[int, Direction], Example] = {}
    left = dict.fromkeys(DIRECTIONS, count)
    for example in examples(rng, held_out=True):
        if left[example.direction] and (example.number, example.direction) not in distinct:
            distinct[example.number, example.direction] = example
            left[example.direction] -= 1
        if not any(left.values()):
            break
    return list(distinct.values())


def _group(value: int) -> str:
    """Four digits without the myriad unit: 305 -> 三百零五; 0 gives the empty text."""
    text, gap = "", False
    for place in (3, 2, 1, 0):
        digit = value // 10**place % 10
        if digit:
            text += ("零" if gap and text else "") + _DIGITS[digit] + _UNITS[place]
        gap = digit == 0
    return text
