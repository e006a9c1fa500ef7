"""Plain text: cleaning it, and cutting it at line breaks into pieces of a useful length."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Control characters but line feed and tab, invisible format characters, lone surrogates, the replacement character.
_JUNK = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff\ufff9-\ufffd\ud800-\udfff"
_BLANKS = r" \t\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000"
# Whether there is anything to clean: most text of most corpora passes untouched.
_UNCLEAN = re.compile(
    f"[{_JUNK}\\t\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]|  |\n |\n\n\n| \n|^[{_BLANKS}\n]|[{_BLANKS}\n]\\Z"
)
_LINE_ENDS = re.compile("\r\n?|[\x85\u2028\u2029]")
_JUNK_RUN = re.compile(f"[{_JUNK}]+")
_BLANK_RUN = re.compile(f"[{_BLANKS}]+")
_BLANKS_AT_LINE_ENDS = re.compile(" ?\n ?")
_EMPTY_LINES = re.compile("\n{3,}")
_SENTENCE_END = re.compile(r"[。！？!?；;…][”’」』）)\"']*|[.](?=\s)")


def clean_text(text: str) -> str:
    r"""Remove what carries no meaning: control and invisible characters, runs of blanks, runs of empty lines.

    Every run of blanks (ideographic and no-break spaces and tabs, too) becomes one space; no line begins or ends with
    one; at most one line is empty between two that are not; line ends are ``\n``. Cleaning twice changes nothing.
    """
    if not _UNCLEAN.search(text):
        return text
    text = _LINE_ENDS.sub("\n", text)
    text = _JUNK_RUN.sub("", text)
    text = _BLANK_RUN.sub(" ", text)
    text = _BLANKS_AT_LINE_ENDS.sub("\n", text)
    return _EMPTY_LINES.sub("\n\n", text).strip(" \n")


def split_text(text: str, max_length: int) -> Iterator[str]:
    """Cut a text at line breaks into pieces as long as ``max_length`` characters allows.

    A line that is longer is cut after the last sentence that fits, or where it must. The pieces hold every character
    of the text in order, but for the line breaks that were cut at.
    """
    if len(text) <= max_length:
        yield text
        return
    piece = ""
    started = False
    for line in text.split("\n"):
        if started and len(piece) + 1 + len(line) <= max_length:
            piece += "\n" + line
            continue
        if started:
            yield piece
        while len(line) > max_length:
            cut = _last_sentence_end(line, max_length)
            yield line[:cut]
            line = line[cut:]
        piece, started = line, True
    yield piece


def _last_sentence_end(line: str, limit: int) -> int:
    """Where the last sentence within the first ``limit`` characters ends; ``limit`` where none does."""
    end = 0
    for match in _SENTENCE_END.finditer(line, 0, limit):
        end = match.end()
    return end or limit
