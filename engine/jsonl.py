"""Lines of JSON Lines files and of standard input: numbered, and none longer than memory is meant for."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import BinaryIO

from cpmbee.errors import CpmBeeError

MAX_LINE = 64 << 20  # bytes; a longer line is no record that anybody wrote


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
    number = 0
    while True:
        number += 1
        try:
            line = file.readline(limit + 1)
        except OSError as error:
            raise error_class(f"{name}, line {number}: cannot be read ({error.strerror})") from None
        if len(line) > limit:
            raise error_class(f"{name}, line {number}: longer than {limit >> 20} MiB; a record is one line")
        if not line:
            return
        if number == 1:
            line = line.removeprefix(BOM_UTF8)
        if line.strip():
            yield number, line
