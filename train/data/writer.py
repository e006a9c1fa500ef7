"""Writing a data set: records in, shards of record batches out, the manifest last."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from cpmbee.errors import DataError
from cpmbee.outputs import FolderKind, require_replaceable
from cpmbee.staging import staged_folder
from cpmbee.train.data.manifest import MANIFEST, Manifest, ShardEntry
from cpmbee.train.data.records import MAX_RECORD_BYTES, Record, count_characters
from cpmbee.train.data.shard_file import SCHEMA, make_batch

DEFAULT_SHARD_BYTES = 512 << 20
BATCH_BYTES = 256 << 10  # of payload: what is compared with its checksum at once
DATA_SET = FolderKind("a data set", re.compile(rf"{re.escape(MANIFEST)}|shard-\d{{5,}}\.arrow"), Manifest.read)


class _HashingFile:
    """A file for Arrow's writer that knows its checksum and size."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)
        self._hash.update(view)
        self.size += view.nbytes
        self._file.write(view)
        return view.nbytes

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self.closed = True

    def sha256(self) -> str:
        return self._hash.hexdigest()


class DatasetWriter:
    """Writes records into a folder; memory stays flat, whatever their number.

    Args:
        folder: an empty folder; a data set once `finish` has been called.
        shard_bytes: a shard is closed when its payloads have so many bytes.
    """

    def __init__(self, folder: Path, shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._shards: list[ShardEntry] = []
        self._payloads: list[bytes] = []
        self._lengths: list[int] = []
        self._pending = 0  # bytes of the payloads above
        self._in_shard = [0, 0, 0]  # records, characters, bytes written
        self._file: IO[bytes] | None = None
        self._sink: _HashingFile | None = None
        self._arrow: Any = None
        self.records = 0

    def write(self, record: Record) -> None:
        """Append a record.

        Raises:
            DataError: it is larger than `MAX_RECORD_BYTES`, or holds what UTF-8 cannot.
        """
        self.write_payload(to_payload(record), count_characters(record))

    def write_payload(self, payload: bytes, length: int) -> None:
        """Append a record that is JSON text already, with ``length`` characters of text in it."""
        self._payloads.append(payload)
        self._lengths.append(length)
        self._pending += len(payload)
        self.records += 1
        if self._pending >= BATCH_BYTES:
            self._write_batch()

    def finish(self, source: Mapping[str, Any]) -> Manifest:
        """Close the last shard and write the manifest.

        Args:
            source: what the data set was built from, JSON-ready.
        """
        self._write_batch()
        self._close_shard()
        manifest = Manifest(tuple(self._shards), dict(source))
        manifest.write(self._folder)
        return manifest

    def close(self) -> None:
        """Let go of the files, finished or not."""
        if self._file is not None:
            self._file.close()

    def _write_batch(self) -> None:
        if not self._payloads:
            return
        if self._arrow is None:
            self._file = (self._folder / self._shard_name()).open("wb")
            self._sink = _HashingFile(self._file)
            self._arrow = pa.ipc.new_file(pa.PythonFile(self._sink, "w"), SCHEMA)
        batch, metadata = make_batch(self._payloads, self._lengths)
        self._arrow.write_batch(batch, custom_metadata=metadata)
        for i, more in enumerate((len(self._payloads), sum(self._lengths), self._pending)):
            self._in_shard[i] += more
        self._payloads, self._lengths, self._pending = [], [], 0
        if self._in_shard[2] >= self._shard_bytes:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._arrow is None or self._sink is None or self._file is None:
            return
        self._arrow.close()
        self._file.close()
        records, characters, _ = self._in_shard
        entry = ShardEntry(self._shard_name(), records, characters, self._sink.size, self._sink.sha256())
        self._shards.append(entry)
        self._arrow = self._sink = self._file = None
        self._in_shard = [0, 0, 0]

    def _shard_name(self) -> str:
        return f"shard-{len(self._shards):05d}.arrow"


@contextmanager
def new_dataset(folder: Path, overwrite: bool, shard_bytes: int = DEFAULT_SHARD_BYTES) -> Iterator[DatasetWriter]:
    """A writer whose data set appears at ``folder`` when the block has called `DatasetWriter.finish` and ends.

    Args:
        folder: where the data set shall be.
        overwrite: replace a data set that is there.
        shard_bytes: as `DatasetWriter`'s.

    Raises:
        DataError: something is there that must not be replaced, or the disk refuses.
    """

    def replaceable(target: Path) -> None:
        require_replaceable(target, DATA_SET, overwrite, DataError)

    with staged_folder(folder, DataError, replaceable) as staging:
        writer = DatasetWriter(staging, shard_bytes)
        try:
            yield writer
        finally:
            writer.close()


def to_payload(record: Record) -> bytes:
    """A record as JSON text in UTF-8.

    Raises:
        DataError: it is larger than `MAX_RECORD_BYTES`, or holds what UTF-8 cannot.
    """
    try:
        payload = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"holds {error.object[error.start : error.end]!r}, which is no character") from None
    if len(payload) > MAX_RECORD_BYTES:
        raise DataError(f"has {len(payload)} bytes, a record may have {MAX_RECORD_BYTES}")
    return payload
