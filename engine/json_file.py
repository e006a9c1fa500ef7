"""Reading a JSON object from a file that may hold anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpmbee.errors import CpmBeeError

# What `json.loads` raises for bytes that it cannot read; nesting too deep for Python's stack is one of them.
NOT_JSON = (ValueError, RecursionError)


def read_json_object(path: Path, what: str, error: type[CpmBeeError]) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        what: what it should be, for the message.
        error: raised where it is not.

    Raises:
        CpmBeeError: as ``error``: the file cannot be read, is not JSON, or not an object; names it.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as reason:
        raise error(f"{path}: cannot read {what} ({reason.strerror})") from None
    except NOT_JSON as reason:
        raise error(f"{path}: not JSON ({reason})") from None
    if not isinstance(raw, dict):
        raise error(f"{path}: expected a JSON object")
    return raw
