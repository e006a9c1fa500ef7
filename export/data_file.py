"""Writes the external data file of a model: tensors one after another, page-aligned, hashed on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from cpmbee.errors import ExportError

ALIGNMENT = 4096  # a page: ONNX Runtime then maps a tensor instead of copying it


class DataFile:
    """The file beside ``model.onnx`` that holds its large tensors.

    Attributes:
        size: bytes written so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()
        self._file = path.open("wb")

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(
        self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], pieces: Iterable[NDArray[Any]]
    ) -> onnx.TensorProto:
        """Write one tensor from its pieces along the first axis; returns the initializer that points to it.

        Raises:
            ExportError: the pieces do not add up to ``shape``.
        """
        self._write(bytes(-self.size % ALIGNMENT))
        offset = self.size
        for piece in pieces:
            # External data is little-endian, whatever the machine.
            self._write(np.ascontiguousarray(piece, dtype=dtype.newbyteorder("<")).data.cast("B"))
        length = int(np.prod(shape)) * dtype.itemsize
        if self.size - offset != length:
            raise ExportError(f"{name}: {self.size - offset} bytes were made, {length} were planned")
        tensor = onnx.TensorProto(name=name, dims=shape, data_location=onnx.TensorProto.EXTERNAL)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(dtype)
        for key, value in (("location", self.path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def hexdigest(self) -> str:
        """SHA-256 of everything written so far."""
        return self._hash.hexdigest()

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)
