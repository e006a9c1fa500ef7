"""What every data set is to its readers: numbered records, each a nested dict stored as JSON."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmbee.errors import DataError
from cpmbee.json_file import parse_json

Record = dict[str, Any]
MAX_RECORD_BYTES = 64 << 20


class RecordSet(Sequence[Record]):
    """A read-only sequence of records, numbered from 0.

    Attributes:
        name: what messages call it.
    """

    name: str

    @abstractmethod
    def payload(self, index: int) -> bytes:
        """A record as it is stored: JSON text in UTF-8.

        Args:
            index: from 0 to the number of records - 1.

        Raises:
            IndexError: there is no such record.
            DataError: its file is damaged.
        """

    @abstractmethod
    def lengths(self) -> NDArray[np.int64]:
        """Characters of text in every record (keys aside), int64[N]."""

    @abstractmethod
    def verify(self) -> None:
        """Read everything once.

        Raises:
            DataError: something is damaged; names the file.
        """

    def __getitem__(self, index: Any) -> Any:
        """The record with a number; negative numbers count from the end, a slice gives a list.

        Raises:
            IndexError: there is no such record.
            DataError: it is damaged.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.read(index + len(self) if index < 0 else index)

    def read(self, index: int) -> Record:
        """The record ``index``, from 0; as `payload`."""
        return parse_record(self.payload(index), f"{self.name}, record {index}")

    def __iter__(self) -> Iterator[Record]:
        return map(self.read, range(len(self)))

    def shard(self, rank: int, world_size: int) -> Shard:
        """A contiguous share of the records; the shares of all ranks make the whole, sizes differ by one at most.

        Raises:
            DataError: ``rank`` is not one of 0 to ``world_size`` - 1.
        """
        if not 0 <= rank < world_size:
            raise DataError(f"rank {rank} is not one of {world_size}")
        return Shard(self, range(len(self) * rank // world_size, len(self) * (rank + 1) // world_size))


class Shard(RecordSet):
    """Some consecutive records of a data set.

    Args:
        whole: the data set.
        indices: which of its records.
    """

    def __init__(self, whole: RecordSet, indices: range) -> None:
        self.name = whole.name
        self.indices = indices
        self._whole = whole

    def __len__(self) -> int:
        return len(self.indices)

    def payload(self, index: int) -> bytes:
        """As `RecordSet.payload`."""
        if index < 0:
            raise IndexError(index)
        return self._whole.payload(self.indices[index])

    def lengths(self) -> NDArray[np.int64]:
        """As `RecordSet.lengths`."""
        return self._whole.lengths()[self.indices.start : self.indices.stop]

    def verify(self) -> None:
        """As `RecordSet.verify`, of the whole data set."""
        self._whole.verify()


def parse_record(payload: bytes, where: str) -> Record:
    """The dict that a payload holds.

    Raises:
        DataError: it is not a JSON object in UTF-8; names ``where``.
    """
    if len(payload) > MAX_RECORD_BYTES:
        raise DataError(f"{where}: has {len(payload)} bytes, a record may have {MAX_RECORD_BYTES}")
    record = parse_json(payload, where, DataError)
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, not {type(record).__name__}")
    return record


def count_characters(value: object) -> int:
    """Characters in the strings of a nested dict or list, keys aside."""
    total, rest = 0, [value]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, dict):
            rest.extend(value.values())
        elif isinstance(value, list):
            rest.extend(value)
    return total
