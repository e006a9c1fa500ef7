"""Opening a data set, whoever wrote it."""

from __future__ import annotations

import os
from pathlib import Path

from cpmbee.errors import DataError
from cpmbee.staging import recover
from cpmbee.train.data.dataset import Dataset
from cpmbee.train.data.legacy import META, LegacyDataset
from cpmbee.train.data.manifest import MANIFEST
from cpmbee.train.data.records import RecordSet


def open_dataset(folder: str | Path) -> RecordSet:
    """Open a data set of ours or of the original tools, read-only.

    Raises:
        DataError: there is none, or it is damaged; names the file.
    """
    path = Path(folder)
    recover(path)
    if os.path.exists(path / MANIFEST):  # unlike Path's method, False for any name that no file can have
        return Dataset(path)
    if os.path.exists(path / META):
        return LegacyDataset(path)
    what = "is not a data set" if os.path.exists(path) else "does not exist"
    raise DataError(f"{path}: {what}; `cpmbee data build` makes one, with a {MANIFEST} in it")


def is_dataset(path: Path) -> bool:
    """Whether a path looks like a data set."""
    recover(path)
    return os.path.exists(path / MANIFEST) or os.path.exists(path / META)
