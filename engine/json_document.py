"""One JSON value over several lines: a pretty-printed object, or an array of objects."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

from cpmbee.errors import PromptError
from cpmbee.jsonl import MAX_LINE

Line = tuple[int, bytes]  # its number from 1, and its bytes

_STRING_OR_BRACKET = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)  # no string goes on in the next line


def left_open(line: bytes, *, may_wait: bool) -> bool:
    """Whether a line that is no JSON value by itself begins one that goes on in the next line.

    Args:
        line: what was read first.
        may_wait: reading on may wait for somebody who waits for an answer: then only a line that visibly goes on (after
            a comma, a colon or an opening bracket) is left open, as every pretty printer writes it.
    """
    text = line.strip()
    if not text.startswith((b"{", b"[")) or not _open_brackets(text, []):
        return False
    return not may_wait or text.endswith((b"{", b"[", b",", b":"))


class Document:
    """The lines of a JSON value that begins in ``first``, read up to its last bracket.

    Args:
        first: a line for which `left_open` holds.
        lines: what follows; read as far as the value goes, or one line further where it turns out to be none.
        name: what messages call the input.

    Attributes:
        lines: its lines.
        next: the line that showed that this is no JSON value, because a request begins where none can; else None.

    Raises:
        PromptError: there is no end in sight.
    """

    def __init__(self, first: Line, lines: Iterator[Line], name: str) -> None:
        self.lines: list[Line] = []
        self.next: Line | None = None
        brackets: list[bytes] = []
        before, size = b"", 0
        for number, line in chain([first], lines):
            text = line.strip()
            if before and text.startswith(b"{") and not _value_may_follow(before, brackets[-1]):
                self.next = number, line
                return
            self.lines.append((number, line))
            size += len(line)
            if size > MAX_LINE:
                raise PromptError(
                    f"{name}, line {first[0]}: begins a JSON value of more than {MAX_LINE >> 20} MiB; "
                    "write one request a line"
                )
            if not _open_brackets(text, brackets):
                return
            before = text

    @property
    def text(self) -> bytes:
        """All of it, each line where it is in the input, so that the places in messages of the parser are right."""
        parts, last = [], 0
        for number, line in self.lines:
            parts.append(b"\n" * (number - last - 1) + line)
            last = number
        return b"".join(parts)


def _open_brackets(text: bytes, brackets: list[bytes]) -> list[bytes]:
    """The brackets that are open behind a line; changes and returns those that were open before it."""
    for token in _STRING_OR_BRACKET.findall(text):
        if token in (b"{", b"["):
            brackets.append(token)
        elif token in (b"}", b"]") and brackets:
            brackets.pop()
    return brackets


def _value_may_follow(before: bytes, bracket: bytes) -> bool:
    return before.endswith((b":", b"[")) or (before.endswith(b",") and bracket == b"[")
