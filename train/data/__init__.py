"""The data pipeline: from texts and JSON lines to packed training batches."""

from cpmbee.train.data.build import BuildReport, TextOptions, build_dataset
from cpmbee.train.data.dataset import Dataset
from cpmbee.train.data.opening import open_dataset
from cpmbee.train.data.records import RecordSet
from cpmbee.train.data.writer import DatasetWriter

__all__ = [
    "BuildReport",
    "Dataset",
    "DatasetWriter",
    "RecordSet",
    "TextOptions",
    "build_dataset",
    "open_dataset",
]
