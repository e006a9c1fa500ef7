"""The table of contents of a data set: ``manifest.json``, written last, so that a folder that has one is complete."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cpmbee.errors import DataError
from cpmbee.json_file import read_json_object

MANIFEST = "manifest.json"
FORMAT = "cpmbee-dataset"
SCHEMA_VERSION = 1
_NAME_BYTES = 255  # of a file, on any system


@dataclass(frozen=True)
class ShardEntry:
    """One file of records.

    Attributes:
        file: its name in the folder.
        records: how many.
        characters: of text in them.
        size: of the file in bytes.
        sha256: of the file, in hexadecimal.
    """

    file: str
    records: int
    characters: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a data set holds.

    Attributes:
        shards: its files, in order.
        source: what it was built from and how; for people.
    """

    shards: tuple[ShardEntry, ...]
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def records(self) -> int:
        """Number of records."""
        return sum(shard.records for shard in self.shards)

    @property
    def characters(self) -> int:
        """Characters of text in all records."""
        return sum(shard.characters for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder."""
        document = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "records": self.records,
            "characters": self.characters,
            "source": self.source,
            "shards": [asdict(shard) for shard in self.shards],
        }
        text = json.dumps(document, ensure_ascii=False, indent=2)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the manifest of a folder.

        Raises:
            DataError: it is absent, of a newer schema, or not a manifest; names the file.
        """
        path = folder / MANIFEST
        raw = read_json_object(path, "the manifest of a data set", DataError)
        if raw.get("format") != FORMAT:
            raise DataError(f"{path}: is not the manifest of a data set")
        if raw.get("schema_version") != SCHEMA_VERSION:
            raise DataError(
                f"{path}: has schema version {raw.get('schema_version')}, this cpmbee reads {SCHEMA_VERSION}"
            )
        source, shards = raw.get("source"), raw.get("shards")
        if not isinstance(shards, list) or not isinstance(source, dict):
            raise DataError(f"{path}: has no list of shards, or no source")
        manifest = cls(tuple(_shard_entry(path, number, shard) for number, shard in enumerate(shards)), source)
        if raw.get("records") != manifest.records:
            raise DataError(f"{path}: counts {raw.get('records')} records, its shards {manifest.records}")
        return manifest


def _shard_entry(path: Path, number: int, raw: object) -> ShardEntry:
    types = ShardEntry.__annotations__
    if not isinstance(raw, dict) or raw.keys() != types.keys():
        raise DataError(f"{path}: shard {number} does not have the fields {', '.join(types)}")
    for name, kind in types.items():
        value = raw[name]
        wrong = not isinstance(value, str) if kind == "str" else type(value) is not int or not 0 <= value < 1 << 48
        if wrong:
            raise DataError(f"{path}: shard {number} has a bad {name}: {value!r}")
    if not _is_plain_name(raw["file"]):
        raise DataError(f"{path}: shard {number} lies outside the data set, or has no name of a file: {raw['file']!r}")
    return ShardEntry(**raw)


def _is_plain_name(name: str) -> bool:
    """Whether a name is a file's in a folder, on any system: no path, no zero byte, no lone surrogate."""
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        return False
    return 0 < length <= _NAME_BYTES and not set(name) & set("/\\:\0") and name not in (".", "..")
