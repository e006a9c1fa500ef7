"""Reading data sets that the original tools wrote.

A folder has ``meta.bin``, one JSON object a line for each file: ``file_name``, ``block_begin`` and ``block_end`` (its
share of the data set's blocks), ``nbytes`` and ``nlines`` (its records), ``mask`` (true: leave it out) and
``block_size``. A file is a row of blocks of that size; a block holds records (the byte 0x1F, the payload's length as
little-endian uint32, the payload) and is filled with zeros.
"""

from __future__ import annotations

import bisect
import json
import mmap
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmbee.errors import DataError
from cpmbee.json_file import parse_json
from cpmbee.jsonl import numbered_lines
from cpmbee.model.pickle_machine import PROTOCOL_MARK
from cpmbee.regular_file import open_regular
from cpmbee.train.data.plain_pickle import load_plain
from cpmbee.train.data.records import RecordSet, count_characters

META = "meta.bin"
RECORD_MARK = 0x1F
_HEADER = struct.Struct("<BI")
_MAX_ENTRY_BYTES = 1 << 20  # of a line of meta.bin
_MAX_FILES = 1 << 16
_OPEN_BLOCKS = 256  # whose records' places are kept


@dataclass(frozen=True)
class _FileEntry:
    path: Path
    blocks: int
    block_size: int
    records: int


class _DataFile:
    """One mapped file and where its records are."""

    def __init__(self, entry: _FileEntry) -> None:
        self.entry = entry
        with open_regular(entry.path, "a file of the data set", DataError) as file:
            try:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise DataError(f"{entry.path}: cannot be mapped ({error.strerror})") from None
            except ValueError:
                raise self.damaged("it is empty") from None
        if len(self.map) != entry.blocks * entry.block_size:
            raise self.damaged(f"it has {len(self.map)} bytes, meta.bin says {entry.blocks} x {entry.block_size}")
        self.block = lru_cache(_OPEN_BLOCKS)(self._block)
        self.starts = [0]  # record number at which each block starts
        for number in range(entry.blocks):
            if number and self.starts[-1] == self.starts[-2]:  # zeros take no place on a disk: there may be many
                raise self.damaged(f"block {number - 1} has no record")
            self.starts.append(self.starts[-1] + len(self.block(number)))
        if self.starts[-1] != entry.records:
            raise self.damaged(f"it has {self.starts[-1]} records, meta.bin says {entry.records}")

    def payload(self, index: int) -> bytes:
        number = bisect.bisect_right(self.starts, index) - 1
        start, length = self.block(number)[index - self.starts[number]]
        return self.map[start : start + length]

    def _block(self, number: int) -> NDArray[np.int64]:
        """Start and length of every payload of a block, int64[n, 2]."""
        places: list[tuple[int, int]] = []
        offset, end = number * self.entry.block_size, (number + 1) * self.entry.block_size
        while offset < end and self.map[offset] != 0:
            if end - offset < _HEADER.size:
                raise self.damaged(f"a record at byte {offset} reaches over the end of its block")
            mark, length = _HEADER.unpack_from(self.map, offset)
            if mark != RECORD_MARK:
                raise self.damaged(f"no record begins at byte {offset}")
            if length > end - offset - _HEADER.size:
                raise self.damaged(f"a record at byte {offset} reaches over the end of its block")
            places.append((offset + _HEADER.size, length))
            offset += _HEADER.size + length
        return np.array(places, np.int64).reshape(-1, 2)

    def damaged(self, reason: str) -> DataError:
        return DataError(f"{self.entry.path}: the file is damaged: {reason}")


class LegacyDataset(RecordSet):
    """A data set of the original tools, opened read-only: JSON payloads, or pickles of plain data.

    Args:
        folder: with ``meta.bin`` and the files that it names.

    Raises:
        DataError: a file is absent or damaged; names it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = str(folder)
        self._files = [_DataFile(entry) for entry in _read_meta(self.folder)]
        self._starts: list[int] = [0, *np.cumsum([f.entry.records for f in self._files], dtype=np.int64).tolist()]

    def __len__(self) -> int:
        return self._starts[-1]

    def payload(self, index: int) -> bytes:
        """As `RecordSet.payload`; a pickle is given as JSON.

        Raises:
            DataError: a pickle holds more than plain data.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} records, so none with number {index}")
        number = bisect.bisect_right(self._starts, index) - 1
        payload = self._files[number].payload(index - self._starts[number])
        if payload[:1] != bytes([PROTOCOL_MARK]):
            return payload
        try:
            return json.dumps(load_plain(payload), ensure_ascii=False).encode("utf-8", "surrogatepass")
        except DataError as error:
            raise DataError(f"{self.name}, record {index}: {error}") from None
        except (RecursionError, TypeError, ValueError) as error:
            raise DataError(f"{self.name}, record {index}: pickle holds no plain dict ({error})") from None

    def lengths(self) -> NDArray[np.int64]:
        """As `RecordSet.lengths`; reads every record."""
        return np.fromiter(map(count_characters, self), np.int64, len(self))

    def verify(self) -> None:
        """Read every record, as there are no checksums."""
        for index in range(len(self)):
            self.read(index)


def _read_meta(folder: Path) -> list[_FileEntry]:
    path = folder / META
    entries = []
    with open_regular(path, "the list of a data set's files", DataError) as file:
        for number, line in numbered_lines(file, str(path), DataError, _MAX_ENTRY_BYTES):
            where = f"{path}, line {number}"
            raw = parse_json(line, where, DataError)
            try:
                entry = _file_entry(folder, raw)
            except KeyError as error:
                raise DataError(f"{where}: has no field {error}") from None
            except (TypeError, ValueError, OSError, RuntimeError) as error:  # of a path, the last three
                raise DataError(f"{where}: {error}") from None
            if entry is not None:
                entries.append(entry)
            if len(entries) > _MAX_FILES:
                raise DataError(f"{path}: names more than {_MAX_FILES} files")
    return entries


def _file_entry(folder: Path, raw: Any) -> _FileEntry | None:
    """What a line of ``meta.bin`` says; None for a file that is left out."""
    if not isinstance(raw, dict) or not isinstance(raw["file_name"], str):
        raise TypeError("is not an object with the name of a file")
    numbers = [raw[name] for name in ("block_begin", "block_end", "nbytes", "nlines", "block_size")]
    if any(type(number) is not int or number < 0 for number in numbers) or numbers[4] == 0:
        raise TypeError("sizes must be whole numbers")
    begin, end, _, records, block_size = numbers
    if raw.get("mask"):
        return None
    path = folder / raw["file_name"]
    if not path.resolve().is_relative_to(folder.resolve()):
        raise TypeError(f"{raw['file_name']!r} lies outside the data set")
    return _FileEntry(path, end - begin, block_size, records)
