"""One file of records: an Arrow IPC file with small record batches, memory-mapped, each checked when first read."""

from __future__ import annotations

import bisect
import hashlib
import mmap
import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cpmbee.errors import DataError
from cpmbee.regular_file import open_regular
from cpmbee.train.data.arrow_blocks import unfolds
from cpmbee.train.data.manifest import ShardEntry

# A record is its JSON text and its characters of text; a record batch carries the checksum of both columns.
SCHEMA = pa.schema([pa.field("payload", pa.binary(), nullable=False), pa.field("length", pa.int64(), nullable=False)])
CHECKSUM = b"crc32"
_OPEN_BATCHES = 1024  # per shard; what is kept is a few pointers into the map


class BatchColumns(NamedTuple):
    """The columns of a record batch of n records, views of the mapped file.

    Attributes:
        offsets: int32[n + 1], where each payload starts in ``data``.
        data: the payloads end to end.
        lengths: int64[n].
    """

    offsets: NDArray[np.int32]
    data: memoryview
    lengths: NDArray[np.int64]

    def checksum(self) -> bytes:
        """CRC-32 of the columns, in hexadecimal."""
        crc = zlib.crc32(np.ascontiguousarray(self.offsets - self.offsets[0]).data)
        crc = zlib.crc32(self.data[self.offsets[0] : self.offsets[-1]], crc)
        return b"%08x" % zlib.crc32(np.ascontiguousarray(self.lengths).data, crc)


def make_batch(payloads: Sequence[bytes], lengths: Sequence[int]) -> tuple[Any, Mapping[bytes, bytes]]:
    """A record batch (``pyarrow.RecordBatch``) and the metadata to write with it."""
    batch = pa.record_batch([pa.array(payloads, pa.binary()), pa.array(lengths, pa.int64())], schema=SCHEMA)
    return batch, {CHECKSUM: columns_of(batch).checksum()}


def columns_of(batch: Any) -> BatchColumns:
    """The columns of a ``pyarrow.RecordBatch`` with `SCHEMA`, not copied."""
    payload, length = batch.column(0), batch.column(1)
    _, offsets, data = payload.buffers()
    return BatchColumns(
        np.frombuffer(offsets, np.int32, len(payload) + 1, payload.offset * 4),
        memoryview(data if data is not None else b"").cast("B"),
        np.frombuffer(length.buffers()[1], np.int64, len(length), length.offset * 8),
    )


class ShardFile:
    """A shard, opened read-only.

    Args:
        folder: of the data set.
        entry: what the manifest says about it.

    Raises:
        DataError: the file is absent, of another size than the manifest says, or not such an Arrow file.
    """

    def __init__(self, folder: Path, entry: ShardEntry) -> None:
        self.path = folder / entry.file
        self.entry = entry
        require_shard(folder, entry)
        with open_regular(self.path, "a shard", DataError) as file:
            try:
                self._map = mmap.mmap(file.fileno(), entry.size, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # the disk's, or that it is empty
                raise _damaged(self.path, str(error)) from None
        try:
            if unfolds(self._map):
                raise _damaged(self.path, "its records are compressed, which those of a data set never are")
            self._reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._map)))
            same = self._reader.schema.equals(SCHEMA)
            counts = (
                [self._reader.get_batch(i).num_rows for i in range(self._reader.num_record_batches)] if same else []
            )
        except (pa.ArrowException, OSError, struct.error) as error:
            raise _damaged(self.path, str(error)) from None
        if not same:
            raise _damaged(self.path, "its columns are not payload and length")
        self._starts = [0, *np.cumsum(counts, dtype=np.int64).tolist()]
        if self._starts[-1] != entry.records:
            raise _damaged(self.path, f"it has {self._starts[-1]} records, the manifest says {entry.records}")
        self._verified: set[int] = set()
        self.columns = lru_cache(_OPEN_BATCHES)(self._columns)

    @property
    def num_batches(self) -> int:
        """Record batches in the file."""
        return len(self._starts) - 1

    def payload(self, index: int) -> bytes:
        """A record of this shard, 0 to its number of records - 1.

        Raises:
            DataError: the part of the file where it lies is damaged.
        """
        number = bisect.bisect_right(self._starts, index) - 1
        offsets, data, _ = self.columns(number)
        row = index - self._starts[number]
        return bytes(data[offsets[row] : offsets[row + 1]])

    def verify(self) -> None:
        """Compare the whole file with its checksum in the manifest.

        Raises:
            DataError: they differ.
        """
        digest = hashlib.sha256(self._map).hexdigest()
        if digest != self.entry.sha256:
            raise _damaged(self.path, "its checksum is not the manifest's")

    def _columns(self, number: int) -> BatchColumns:
        """A record batch; its checksum is compared when it is read for the first time."""
        try:
            batch, metadata = self._reader.get_batch_with_custom_metadata(number)[:2]
            if number not in self._verified:
                batch.validate(full=True)
            columns = columns_of(batch)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise _damaged(self.path, f"record batch {number}: {error}") from None
        if number not in self._verified:
            if columns.checksum() != (metadata or {}).get(CHECKSUM):
                raise _damaged(self.path, f"record batch {number} does not match its checksum")
            self._verified.add(number)
        return columns


def require_shard(folder: Path, entry: ShardEntry) -> None:
    """Make sure that a shard is there and as large as it should be, without opening it.

    Raises:
        DataError: it is not; names the file.
    """
    path = folder / entry.file
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror})") from None
    if size != entry.size:
        open_regular(path, "a shard", DataError).close()  # says so if git-lfs has not fetched it
        raise _damaged(path, f"it has {size} bytes, the manifest says {entry.size}")


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: the shard is damaged: {reason}; build the data set again")
