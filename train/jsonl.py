"""JSON Lines as records: indexed once, read one line at a time."""

from __future__ import annotations

import os
from array import array
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpmbee.errors import DataError
from cpmbee.jsonl import numbered_lines
from cpmbee.regular_file import open_regular
from cpmbee.staging import recover
from cpmbee.train.data.records import Record, RecordSet, count_characters, parse_record


class JsonLines(RecordSet):
    """The objects of a JSON Lines file; empty lines are skipped.

    Args:
        path: of the file, which must not change.

    Raises:
        DataError: it is no regular file, cannot be read, or has a line that is too long.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self._file = open_regular(path, "the records", DataError)  # stays open: nothing can take its place
        begins, numbers, sizes = array("q"), array("q"), array("q")
        for number, line in numbered_lines(self._file, self.name, DataError):
            begins.append(self._file.tell() - len(line))
            numbers.append(number)
            sizes.append(len(line))
        self._begins = np.array(begins, np.int64)
        self._numbers = np.array(numbers, np.int64)
        self._sizes = np.array(sizes, np.int64)

    def __len__(self) -> int:
        return len(self._begins)

    def payload(self, index: int) -> bytes:
        """As `cpmbee.train.data.records.RecordSet.payload`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        # Not seek and read: threads share the file.
        return os.pread(self._file.fileno(), int(self._sizes[index]), int(self._begins[index]))

    def where(self, index: int) -> str:
        """The file and the line of a record."""
        return f"{self.path}, line {self._numbers[index]}"

    def read(self, index: int) -> Record:
        """As `cpmbee.train.data.records.RecordSet.read`; errors name the line."""
        return parse_record(self.payload(index), self.where(index))

    def lengths(self) -> NDArray[np.int64]:
        """As `cpmbee.train.data.records.RecordSet.lengths`."""
        return np.array([count_characters(record) for record in self], np.int64)

    def verify(self) -> None:
        """As `cpmbee.train.data.records.RecordSet.verify`."""
        for index in range(len(self)):
            self.read(index)


def open_records(path: str | Path) -> RecordSet:
    """The records of a JSON Lines file, or of a data set's folder.

    Raises:
        DataError: it cannot be read, or has no records.
    """
    path = Path(path)
    recover(path)
    records: RecordSet
    if path.is_dir():
        from cpmbee.train.data.opening import open_dataset  # brings pyarrow, which JSON Lines do without

        records = open_dataset(path)
    else:
        records = JsonLines(path)
    if not len(records):
        raise DataError(f"{path}: has no records")
    return records


def where(records: RecordSet, index: int) -> str:
    """What messages call a record."""
    return records.where(index) if isinstance(records, JsonLines) else f"{records.name}, record {index}"
