"""A mixture of data sets: which, how often, as what task, transformed how, with how many in-context examples.

Its file is a JSON list:

    [{"dataset": "poems", "task": "continue", "weight": 2, "transforms": [{"name": "continue_text"}],
      "incontext_weight": [0.8, 0.1, 0.1]},
     {"dataset": "ccpm", "transforms": "ccpm.py"}]

Paths count from the file's folder. A data set is drawn in proportion to its weight, whatever its size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from cpmbee.errors import CpmBeeError, DataError
from cpmbee.json_file import parse_json
from cpmbee.regular_file import read_text
from cpmbee.train.data.opening import open_dataset
from cpmbee.train.data.records import RecordSet
from cpmbee.train.data.transform import Transform
from cpmbee.train.data.transform_config import parse_transforms

_FIELDS = ("dataset", "weight", "task", "transforms", "incontext_weight")
_MAX_INCONTEXT = 64
_MAX_FILE_BYTES = 16 << 20
_MAX_WEIGHT = 1e100  # so that their sum is a number


@dataclass(frozen=True)
class MixtureText:
    """A mixture as text: its file and the Python files it names, read at one moment.

    Attributes:
        path: of the file.
        config: what is in it.
        scripts: Python files by the path that the file gives.
    """

    path: Path
    config: str
    scripts: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> MixtureText:
        """Read the file and what it names.

        Raises:
            DataError: a file cannot be read; names it.
        """
        config = read_file(path)
        return cls(path, config, {script: read_file(path.parent / script) for script in named_scripts(config)})


def named_scripts(config: str) -> list[str]:
    """The Python files that a mixture names; none where it cannot be understood."""
    try:
        entries = parse_json(config.encode(), "", DataError)
    except DataError:
        return []
    if not isinstance(entries, list):
        return []
    named = [entry.get("transforms") for entry in entries if isinstance(entry, dict)]
    return [script for script in named if isinstance(script, str)]


@dataclass(frozen=True)
class MixtureEntry:
    """One data set of a mixture.

    Attributes:
        key: tells it from the others, before and after an edit of the mixture.
        records: the data set.
        task: what its samples are counted as.
        transform: makes samples of records.
        cumulative: shares of 0, 1, 2, ... in-context examples, summed up; the last is 1.
    """

    key: str
    records: RecordSet
    task: str
    transform: Transform
    cumulative: tuple[float, ...]


@dataclass(frozen=True)
class Mixture:
    """The data sets of a mixture that have a weight.

    Attributes:
        path: its file.
        entries: the data sets.
        cumulative: their shares, summed up; the last is 1.
    """

    path: Path
    entries: tuple[MixtureEntry, ...]
    cumulative: tuple[float, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, each once, in order."""
        return tuple(dict.fromkeys(entry.task for entry in self.entries))


def parse_mixture(text: MixtureText, opened: Mapping[str, RecordSet] | None = None) -> Mixture:
    """Understand a mixture and open its data sets.

    Args:
        text: the mixture.
        opened: data sets that are open already, by `MixtureEntry.key`.

    Raises:
        DataError: the mixture or a data set cannot be used; names file, data set and field.
    """
    raw = parse_json(text.config.encode(), str(text.path), DataError)
    if not isinstance(raw, list) or not raw:
        raise DataError(f"{text.path}: expected a list of data sets that is not empty")
    entries: list[MixtureEntry] = []
    weights: list[float] = []
    keys: set[str] = set()
    for number, fields in enumerate(raw):
        name = fields.get("dataset") if isinstance(fields, dict) else None
        where = f"{text.path}, data set {number}" + (f" ({name})" if isinstance(name, str) else "")
        try:
            if not isinstance(fields, dict):
                raise DataError(f"expected an object, not {type(fields).__name__}")
            name, task = _named(fields)
            key = _unlike(f"{name}:{task}", keys)
            keys.add(key)  # switched off or not: the others' must not change with it
            if weight := _weight("weight", fields.get("weight", 1)):
                entries.append(_entry(fields, name, task, key, text, opened or {}))
                weights.append(weight)
        except CpmBeeError as error:
            raise DataError(f"{where}: {error}") from None
    if not entries:
        raise DataError(f"{text.path}: every weight is 0")
    return Mixture(text.path, tuple(entries), _cumulative(weights))


def _named(fields: dict[str, Any]) -> tuple[str, str]:
    """The data set of an entry, and its task."""
    if unknown := [name for name in fields if name not in _FIELDS]:
        raise DataError(f"{unknown[0]}: no such field; there are {', '.join(_FIELDS)}")
    name = fields.get("dataset")
    if not isinstance(name, str) or not name:
        raise DataError("dataset: expected the path of a data set")
    task = fields.get("task", Path(name).name)
    if not isinstance(task, str) or not task:
        raise DataError("task: expected a name")
    return name, task


def _unlike(key: str, taken: set[str]) -> str:
    """The key, numbered where it is taken."""
    numbered, number = key, 1
    while numbered in taken:
        number += 1
        numbered = f"{key}:{number}"
    return numbered


def _entry(
    fields: dict[str, Any], name: str, task: str, key: str, text: MixtureText, opened: Mapping[str, RecordSet]
) -> MixtureEntry:
    try:
        transform = parse_transforms(fields.get("transforms"), text.scripts)
    except CpmBeeError as error:
        raise DataError(f"transforms: {error}") from None
    shares = fields.get("incontext_weight", [1])
    if not isinstance(shares, list) or not 0 < len(shares) <= _MAX_INCONTEXT + 1:
        raise DataError(f"incontext_weight: expected a list of weights for 0 to at most {_MAX_INCONTEXT} examples")
    weights = [_weight(f"incontext_weight[{i}]", share) for i, share in enumerate(shares)]
    if not any(weights):
        raise DataError("incontext_weight: every weight is 0")
    records = opened.get(key) or open_dataset(text.path.parent / name)
    if not len(records):
        raise DataError("dataset: the data set is empty")
    return MixtureEntry(key, records, task, transform, _cumulative(weights))


def _weight(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MAX_WEIGHT:
        raise DataError(f"{name}: expected a number from 0 on, not {value!r:.80}")
    return float(value)


def _cumulative(weights: list[float]) -> tuple[float, ...]:
    total = sum(weights)
    return (*(part / total for part in accumulate(weights[:-1])), 1.0)


def read_file(path: Path) -> str:
    """A file's text.

    Raises:
        DataError: it cannot be read; names it.
    """
    return read_text(path, "a file of the mixture", DataError, _MAX_FILE_BYTES)
