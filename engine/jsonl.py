"""Lines of JSON Lines files and of standard input: numbered, and none longer than memory is meant for."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import BinaryIO

from cpmbee.errors import CpmBeeError

MAX_LINE = 64 << 20  # bytes; a longer line is no record that anybody wrote
_SKIPPED_AT_ONCE = 1 << 20


def numbered_lines(
    file: BinaryIO, name: str, error_class: type[CpmBeeError], limit: int = MAX_LINE
) -> Iterator[tuple[int, bytes]]:
    r"""The lines of a file that are not blank, each as soon as it is there, with its number from 1.

    Lines end at ``\n`` only: a text may hold the line ends that only Unicode knows. A byte order mark is left out.

    Args:
        file: is read line by line; a pipe will do.
        name: what messages call it.
        error_class: of what is raised.
        limit: most bytes of a line.

    Raises:
        CpmBeeError: as ``error_class``: a line is too long, or the file cannot be read; names the line.
    """
    for number, content, _ in all_lines(file, name, error_class, limit):
        if content is None:
            raise error_class(f"{name}, line {number}: {too_long(limit)}")
        if not content.isspace():
            yield number, content


def all_lines(
    file: BinaryIO, name: str, error_class: type[CpmBeeError], limit: int = MAX_LINE
) -> Iterator[tuple[int, bytes | None, int]]:
    """Every line of a file, as `numbered_lines`; one that is too long is skipped when the next is asked for.

    Returns:
        Its number from 1; the line with its end, or None where it is too long; bytes read since the line before.

    Raises:
        CpmBeeError: as ``error_class``: the file cannot be read; names the line.
    """
    number = skipped = 0
    while True:
        number += 1
        try:
            content = file.readline(limit + 1)
            size = len(content)
            if size > limit:
                yield number, None, size + skipped
                skipped = 0
                while content and not content.endswith(b"\n"):
                    content = file.readline(_SKIPPED_AT_ONCE)
                    skipped += len(content)
                continue
        except OSError as error:
            raise error_class(f"{name}, line {number}: cannot be read ({error.strerror})") from None
        if not content:
            return
        yield number, content.removeprefix(BOM_UTF8) if number == 1 else content, size + skipped
        skipped = 0


def too_long(limit: int) -> str:
    """What is wrong with a line of more than ``limit`` bytes."""
    return f"longer than {limit:,} bytes; a record is one line"
