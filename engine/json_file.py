"""Reading a JSON object from a file that may hold anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpmbee.errors import CpmBeeError

# What `json.loads` raises for bytes that it cannot read; nesting too deep for Python's stack is one of them.
NOT_JSON = (ValueError, RecursionError)
MAX_FILE_BYTES = 16 << 20  # parsed, an object takes up to twenty times as much memory


def read_json_object(path: Path, what: str, error: type[CpmBeeError]) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        what: what it should be, for the message.
        error: raised where it is not.

    Raises:
        CpmBeeError: as ``error``: the file cannot be read, is absurdly large, not JSON, or not an object; names it.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as reason:
        raise error(f"{path}: cannot read {what} ({reason.strerror})") from None
    if len(content) > MAX_FILE_BYTES:
        raise error(f"{path}: larger than {MAX_FILE_BYTES >> 20} MiB; is this {what}?")
    try:
        raw = json.loads(content.decode("utf-8"))
    except NOT_JSON as reason:
        raise error(f"{path}: not JSON ({reason})") from None
    if not isinstance(raw, dict):
        raise error(f"{path}: expected a JSON object")
    return raw
