"""Reading a data set: a folder of memory-mapped shards and a manifest."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpmbee.train.data.manifest import Manifest
from cpmbee.train.data.records import RecordSet
from cpmbee.train.data.shard_file import ShardFile, require_shard


class Dataset(RecordSet):
    """A data set that `cpmbee.train.data.DatasetWriter` wrote, opened read-only.

    A record is found in constant memory and without reading what lies before it. A part of a shard (about 256 KiB) is
    compared with its checksum when it is first read; `verify` compares everything.

    Args:
        folder: of the data set.

    Raises:
        DataError: the manifest or a shard is absent or damaged; names the file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = str(folder)
        self.manifest = Manifest.read(self.folder)
        self._starts: list[int] = [0, *np.cumsum([s.records for s in self.manifest.shards], dtype=np.int64).tolist()]
        for entry in self.manifest.shards:
            require_shard(self.folder, entry)
        self._opened: dict[int, ShardFile] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def payload(self, index: int) -> bytes:
        """As `RecordSet.payload`."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has {len(self)} records, so none with number {index}")
        number = bisect.bisect_right(self._starts, index) - 1
        return self._shard(number).payload(index - self._starts[number])

    def lengths(self) -> NDArray[np.int64]:
        """As `RecordSet.lengths`."""
        columns = [shard.columns(i).lengths for shard in self._shards() for i in range(shard.num_batches)]
        return np.concatenate(columns) if columns else np.zeros(0, np.int64)

    def verify(self) -> None:
        """Compare every shard with its checksum in the manifest.

        Raises:
            DataError: a shard is damaged; names its file.
        """
        for shard in self._shards():
            shard.verify()

    def _shards(self) -> Iterator[ShardFile]:
        return map(self._shard, range(len(self.manifest.shards)))

    def _shard(self, number: int) -> ShardFile:
        """A shard, mapped when it is first needed: a data set may have thousands."""
        shard = self._opened.get(number)
        if shard is None:
            shard = self._opened[number] = ShardFile(self.folder, self.manifest.shards[number])
        return shard
