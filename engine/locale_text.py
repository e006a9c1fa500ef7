"""Text of the command line and of standard output where the system's encoding is not UTF-8."""

from __future__ import annotations

import io
import sys
from typing import TextIO

from cpmbee.errors import ConfigError


def argument_text(argument: str, encoding: str | None = None) -> str:
    """What was typed, whatever the locale made Python take it for.

    Terminals send UTF-8 although the locale says otherwise (``LC_ALL=C`` in a container or a cron job). So the bytes
    are read both ways; where exactly one of them is possible, or both give the same, that is it.

    Args:
        argument: one of ``sys.argv``.
        encoding: what Python decoded it with; the system's by default.

    Raises:
        ConfigError: the bytes are neither, or can be both.
    """
    encoding = encoding or sys.getfilesystemencoding()
    try:
        raw = argument.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:  # not decoded from bytes: a program's own text
        return argument
    undecoded = any("\udc80" <= character <= "\udcff" for character in argument)
    advice = "name a file in UTF-8 that has it, or set LC_ALL=C.UTF-8"
    try:
        utf8 = raw.decode("utf-8")
    except UnicodeDecodeError:
        if undecoded:
            raise ConfigError(f"the request on the command line is not UTF-8; {advice}") from None
        return argument
    if undecoded or utf8 == argument:
        return utf8
    raise ConfigError(f"the request on the command line can be read as UTF-8 and as {encoding}; {advice}")


def use_readable_encoding(out: TextIO) -> None:
    """Let text be written in UTF-8 where the encoding of ``out`` has no Chinese characters."""
    if isinstance(out, io.TextIOWrapper):
        try:
            "中".encode(out.encoding)
        except UnicodeEncodeError:
            out.reconfigure(encoding="utf-8", errors="backslashreplace")
