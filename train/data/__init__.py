"""The data pipeline: from texts and JSON lines to packed training batches.

Names are imported on first use, so that what needs no data sets works where pyarrow is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpmbee.train.data.build import BuildReport, TextOptions, build_dataset
    from cpmbee.train.data.dataset import Dataset
    from cpmbee.train.data.opening import open_dataset
    from cpmbee.train.data.records import RecordSet
    from cpmbee.train.data.writer import DatasetWriter

_HOME = {
    "BuildReport": "build",
    "Dataset": "dataset",
    "DatasetWriter": "writer",
    "RecordSet": "records",
    "TextOptions": "build",
    "build_dataset": "build",
    "open_dataset": "opening",
}

__all__ = [
    "BuildReport",
    "Dataset",
    "DatasetWriter",
    "RecordSet",
    "TextOptions",
    "build_dataset",
    "open_dataset",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
