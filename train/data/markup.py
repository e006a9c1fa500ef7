"""CPM-Bee's markup inside text: ``<name>`` is one special token, ``<<`` a literal ``<``; neither may be cut in two."""

from __future__ import annotations

import re
from typing import Any

from cpmbee.encoding import MAX_NESTING
from cpmbee.errors import PromptError
from cpmbee.text_errors import (
    format_path,
    key_not_a_string,
    leaf_not_a_string,
    no_answer_leaf,
    not_a_dict,
    too_deep,
    unclosed_special,
)

_TOKEN = re.compile(r"<<|<[^<][^<>]*>", re.DOTALL)
_PLAIN = re.compile(r"[^<]*")


def check_record(record: object) -> None:
    """Make sure that a record is a nested dict of strings in which every ``<`` is part of a token.

    Raises:
        PromptError: it is not a nested dict of strings; names the path.
        TokenizeError: a ``<`` opens a token that does not close; names the path.
    """
    if not isinstance(record, dict):
        raise not_a_dict("$", record)
    _check_children(record, ())


def _check_children(record: dict[Any, Any], path: tuple[str, ...]) -> None:
    if len(path) >= MAX_NESTING:
        raise too_deep("$", path, MAX_NESTING)
    for key, value in record.items():
        if not isinstance(key, str):
            raise key_not_a_string("$", path, key)
        _check_text(key, (*path, key))
        if isinstance(value, str):
            _check_text(value, (*path, key))
        elif isinstance(value, dict):
            _check_children(value, (*path, key))
        else:
            raise leaf_not_a_string("$", (*path, key), value)


def _check_text(text: str, path: tuple[str, ...]) -> None:
    offset = unclosed_token(text)
    if offset is not None:
        raise unclosed_special(offset, format_path("$", path))


def unclosed_token(text: str) -> int | None:
    """Offset of the first ``<`` that opens a token which does not close; None where there is none."""
    if "<" not in text:
        return None
    offset = 0
    while offset < len(text):
        match = _TOKEN.match(text, offset) or _PLAIN.match(text, offset)
        if match is None or match.end() == offset:
            return offset
        offset = match.end()
    return None


def units(text: str) -> list[str]:
    """The text in parts that may be cut between: single characters, special tokens, literal ``<<``.

    Joined they are the text again.
    """
    if "<" not in text:
        return list(text)
    parts: list[str] = []
    offset = 0
    for match in _TOKEN.finditer(text):
        parts.extend(text[offset : match.start()])
        parts.append(match.group())
        offset = match.end()
    parts.extend(text[offset:])
    return parts


def escape_leaves(record: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """A copy in which every ``<`` of a value is literal; keys stay as they are.

    Raises:
        PromptError: dicts are nested too deep.
    """
    if depth >= MAX_NESTING:
        raise too_deep("$", (), MAX_NESTING)
    escaped = {}
    for key, value in record.items():
        if isinstance(value, dict):
            value = escape_leaves(value, depth + 1)
        escaped[key] = value.replace("<", "<<") if isinstance(value, str) else value
    return escaped


def check_sample(sample: object) -> None:
    """Make sure that a transform gave a dict with something under ``<ans>``.

    Raises:
        PromptError: it did not.
    """
    if not isinstance(sample, dict):
        raise not_a_dict("$", sample)
    if "<ans>" not in sample:
        raise PromptError(f'the sample has no "<ans>", so nothing to learn; it has {", ".join(map(repr, sample))}')
    if not _has_leaf(sample["<ans>"]):
        raise no_answer_leaf("$")


def _has_leaf(value: object) -> bool:
    return any(map(_has_leaf, value.values())) if isinstance(value, dict) else True
