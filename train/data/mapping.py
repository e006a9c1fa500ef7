r"""Mappings: a sample described field by field, with ``$field`` copies, constants and ``*`` wildcards.

    {"input": "$text", "prompt": "写成数字", "options.*": "$choices.*", "<ans>.<option>": "$answer.label"}

A dot leads into a nested dict (``\.`` is a dot in a name); a dict as value nests as well. ``*`` stands for any one
name, on both sides for the same. ``$$`` begins a constant that begins with a dollar sign.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpmbee.encoding import MAX_NESTING
from cpmbee.errors import DataError
from cpmbee.train.data.records import Record
from cpmbee.train.data.transform import ANSWER, Apply

Path = tuple[str, ...]
_WILDCARD = "*"
_DOT = re.compile(r"(?<!\\)\.")


@dataclass(frozen=True)
class _Rule:
    """One field: where it goes, and what it holds (a path into the record, or a constant)."""

    target: Path
    source: Path | None
    constant: str


class FieldMapping:
    """A sample as a list of fields.

    Args:
        fields: target to source, as a mixture has them.

    Raises:
        DataError: a field cannot be understood, or none is under ``<ans>``; names the field.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._rules = list(_rules(fields, ()))
        if not any(rule.target[0] in (ANSWER, _WILDCARD) for rule in self._rules):
            raise DataError(f'the mapping has no target "{ANSWER}", so nothing to learn')

    def plan(self, rng: np.random.Generator) -> Apply:
        """As `cpmbee.train.data.transform.Transform.plan`."""
        return lambda record, num_samples, rng: self(record)

    def __call__(self, record: Record) -> Record:
        """The sample of a record.

        Raises:
            DataError: the record has no such field; names it.
        """
        sample: Record = {}
        for rule in self._rules:
            if rule.source is None:
                _put(sample, rule.target, rule.constant)
                continue
            found = list(_matches(record, rule.source, ()))
            if not found and _WILDCARD not in rule.source:
                fields = ", ".join(map(repr, record))
                raise DataError(f"the record has no field {'.'.join(rule.source)!r}; its fields are {fields}")
            for names, value in found:
                bound = iter(names)
                target = tuple(next(bound) if name == _WILDCARD else name for name in rule.target)
                _put(sample, target, _copy(value))
        return sample


def _rules(fields: Mapping[str, Any], prefix: Path) -> Iterator[_Rule]:
    if len(prefix) > MAX_NESTING:
        raise DataError(f"the mapping is nested deeper than {MAX_NESTING}")
    for key, value in fields.items():
        target = (*prefix, *_split(key))
        name = ".".join(target)
        if isinstance(value, dict):
            yield from _rules(value, target)
            continue
        if not isinstance(value, str):
            raise DataError(f"{name}: expected text, such as a constant or $field, not {type(value).__name__}")
        if value.startswith("$") and not value.startswith("$$"):
            source = _split(value[1:])
            if source.count(_WILDCARD) != target.count(_WILDCARD):
                raise DataError(f"{name}: target and source {value!r} must have equally many *")
            yield _Rule(target, source, "")
        elif _WILDCARD in target:
            raise DataError(f"{name}: a * in the target needs one in its source, a constant has none")
        else:
            yield _Rule(target, None, value[1:] if value.startswith("$$") else value)


def _split(path: str) -> Path:
    names = tuple(name.replace("\\.", ".") for name in _DOT.split(path))
    if "" in names:
        raise DataError(f"{path!r}: a name in the path is empty")
    return names


def _matches(value: Any, source: Path, bound: Path) -> Iterator[tuple[Path, Any]]:
    """Every place that a source path leads to, with the names that its wildcards stand for."""
    if not source:
        yield bound, value
        return
    if not isinstance(value, dict):
        return
    name, *rest = source
    if name == _WILDCARD:
        for key, child in value.items():
            yield from _matches(child, tuple(rest), (*bound, key))
    elif name in value:
        yield from _matches(value[name], tuple(rest), bound)


def _put(sample: Record, target: Path, value: Any) -> None:
    for depth, name in enumerate(target[:-1]):
        sample = sample.setdefault(name, {})
        if not isinstance(sample, dict):
            raise DataError(f"{'.'.join(target)}: {'.'.join(target[: depth + 1])} is text already")
    sample[target[-1]] = value


def _copy(value: Any) -> Any:
    """A copy whose dicts are its own, as later fields may add to them."""
    return {key: _copy(child) for key, child in value.items()} if isinstance(value, dict) else value
