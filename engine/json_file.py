"""Reading JSON that may hold anything: its size, depth and number of values are looked at before memory is taken."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any

import numpy as np

from cpmbee.errors import CpmBeeError
from cpmbee.regular_file import read_regular

# What `json.loads` raises for bytes that it cannot read; nesting too deep for Python's stack is one of them.
NOT_JSON = (ValueError, RecursionError)
MAX_FILE_BYTES = 16 << 20
MAX_DEPTH = 256  # lists and objects in each other; what walks over them later does so by recursion
MAX_VALUES = 1 << 20  # parsed, a value of two bytes takes a hundred
_SHORT = 1024  # bytes of a line that is parsed without looking: at worst, it is nested too deep for Python's parser


def read_json_object(path: Path, what: str, error: type[CpmBeeError]) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        what: what it should be, for the message.
        error: raised where it is not.

    Raises:
        CpmBeeError: as ``error``: the file cannot be read, is absurdly large, not JSON, or not an object; names it.
    """
    content = read_regular(path, what, error, MAX_FILE_BYTES)
    _require_moderate(content, f"{path}: ", error)  # however short: what is wrong with a value is said with it
    raw = parse_json(content, str(path), error)
    if not isinstance(raw, dict):
        raise error(f"{path}: expected a JSON object")
    return raw


def parse_json(content: bytes, where: str, error: type[CpmBeeError]) -> Any:
    """The value that JSON in UTF-8 stands for; a byte order mark is skipped.

    Args:
        content: the text; a limit on its size is the caller's.
        where: it was read, for the message; empty if the caller says it.
        error: raised where it cannot be used.

    Raises:
        CpmBeeError: as ``error``: not UTF-8, not JSON, nested too deep, or made of too many values.
    """
    prefix = f"{where}: " if where else ""
    content = content.removeprefix(BOM_UTF8)
    if len(content) > _SHORT:
        _require_moderate(content, prefix, error)
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as reason:
        raise error(f"{prefix}not JSON (not UTF-8: {reason.reason} at byte {reason.start})") from None
    except NOT_JSON as reason:
        raise error(f"{prefix}not JSON ({reason})") from None


def _require_moderate(content: bytes, prefix: str, error: type[CpmBeeError]) -> None:
    opened = content.count(b"{") + content.count(b"[")
    if opened <= MAX_DEPTH and opened + content.count(b",") <= MAX_VALUES:
        return
    depth, values = _extent(content)
    if depth > MAX_DEPTH:
        raise error(f"{prefix}not JSON that can be read (nested deeper than {MAX_DEPTH})")
    if values > MAX_VALUES:
        raise error(f"{prefix}not JSON that can be read (more than {MAX_VALUES} values)")


def _extent(content: bytes) -> tuple[int, int]:
    """How deep JSON is nested, and about how many values it has; the rest of its grammar does not matter here."""
    unescaped = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    characters = np.frombuffer(unescaped, np.uint8)
    in_string = np.cumsum(characters == ord('"'), dtype=np.uint8) & 1  # wraps around, which keeps what is odd
    characters = characters[in_string == 0]
    opens = (characters == ord("{")) | (characters == ord("["))
    steps = opens.astype(np.int8) - ((characters == ord("}")) | (characters == ord("]")))
    depth = int(np.cumsum(steps, dtype=np.int32).max(initial=0))
    return depth, int(np.count_nonzero(opens) + np.count_nonzero(characters == ord(",")))
