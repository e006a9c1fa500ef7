"""CCPM, Chinese Classical Poetry Matching: which of four classical lines says what a modern text says.

The files are those of the CPM-Bee repository's tutorial: JSON Lines whose ``input`` holds
``[翻译]modern text[0]line[1]line[2]line[3]line[答案]``, and whose ``target`` is the number of the right line. A record
becomes a request of CPM-Bee's own kind, options as keys, the right key as the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpmbee.errors import DataError
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.tasks import TaskRecord

OPTIONS = 4
MASK = "<mask>"
SPECIALS = ("<pad>", "<unk>", MASK, "<sep>", "</n>", "</_>", "<s>", "</s>", "<root>", "<ans>", "<option>")
KEYS = ("input", "options")  # of requests, one token each
_INPUT = re.compile(r"\[翻译\](.*)\[0\](.*)\[1\](.*)\[2\](.*)\[3\](.*)\[答案\]", re.DOTALL)


@dataclass(frozen=True)
class CcpmRecord:
    """One question.

    Attributes:
        text: modern Chinese.
        lines: four classical lines.
        right: index of the line that the text translates.
    """

    text: str
    lines: tuple[str, ...]
    right: int

    @property
    def answer(self) -> str:
        """The line that the text translates."""
        return self.lines[self.right]

    def request(self) -> dict[str, Any]:
        """The request with its answer."""
        return request(Tokenizer.escape(self.text), [Tokenizer.escape(line) for line in self.lines], self.right)

    def task_record(self, where: str) -> TaskRecord:
        """The request as what `cpmbee.train.evaluation` reads; ``where`` goes into messages."""
        data = self.request()
        return TaskRecord(where, data, "ccpm", tuple(data["options"]))


def request(text: str, lines: Sequence[str], right: int) -> dict[str, Any]:
    """A request of marked-up text (`Tokenizer.escape`), with its answer."""
    options = {f"<option_{number}>": line for number, line in enumerate(lines)}
    return {"input": text, "options": options, "<ans>": f"<option_{right}>"}


def read_records(path: Path) -> list[CcpmRecord]:
    """The records of a file.

    Raises:
        DataError: the file cannot be read, or a line is no record; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    return [_record(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _record(line: str, where: str) -> CcpmRecord:
    try:
        raw = json.loads(line)
        found, target = _INPUT.fullmatch(raw["input"]), raw["target"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: expected an object with the texts input and target ({error})") from None
    if found is None:
        raise DataError(f"{where}: input does not read [翻译]...[0]...[1]...[2]...[3]...[答案]")
    if target not in ("0", "1", "2", "3"):
        raise DataError(f"{where}: target must be 0, 1, 2 or 3, not {target!r:.80}")
    text, *options = found.groups()
    return CcpmRecord(text, tuple(options), int(target))


def split(records: Sequence[CcpmRecord], held_out: int, seed: int) -> tuple[list[CcpmRecord], list[CcpmRecord]]:
    """Records to train on, and ``held_out`` others whose modern text is in none of them."""
    chosen = {records[index].text for index in np.random.default_rng(seed).permutation(len(records))[:held_out]}
    return [r for r in records if r.text not in chosen], [r for r in records if r.text in chosen][:held_out]


def unseen(records: Sequence[CcpmRecord], training: Sequence[CcpmRecord]) -> list[CcpmRecord]:
    """The records of which neither the text nor the right line is one of the training records'."""
    texts, answers = {record.text for record in training}, {record.answer for record in training}
    return [record for record in records if record.text not in texts and record.answer not in answers]


def vocabulary(records: Iterable[CcpmRecord]) -> list[str]:
    """Tokens in id order: specials, keys of requests, and every character of the records."""
    characters = {char for record in records for text in (record.text, *record.lines) for char in text}
    return [*SPECIALS, *KEYS, *sorted(char for char in characters if char.strip() and char != "<")]
