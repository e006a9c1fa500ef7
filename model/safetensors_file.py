"""A safetensors file: eight bytes of length, a header in JSON, and the tensors end to end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from cpmbee.errors import CheckpointError
from cpmbee.json_file import parse_json
from cpmbee.model.arrays import Array, map_bytes, numpy_dtype, unsupported_dtype
from cpmbee.regular_file import open_regular

MAX_HEADER_BYTES = 16 << 20
_DTYPES = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}
_MAX_DIMS = 16


class SafetensorsFile:
    """A `cpmbee.model.tensor_files.TensorFile` of this format, memory-mapped.

    Raises:
        CheckpointError: the file is damaged, or holds something other than float tensors; says what.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path, "a safetensors file", CheckpointError) as file:
            try:
                size = file.seek(0, 2)
                file.seek(0)
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > size - 8:
                    raise _damaged(path, "its header is cut off")
                if length > MAX_HEADER_BYTES:
                    raise _damaged(path, f"its header has {length} bytes, that of a model at most {MAX_HEADER_BYTES}")
                content = file.read(length)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        header = parse_json(content, f"{path}: damaged or not a safetensors file", CheckpointError)
        if not isinstance(header, dict):
            raise _damaged(path, "its header is no object")
        header.pop("__metadata__", None)
        self._data_start = 8 + length
        self._entries = header
        spans = sorted(self._span(name, entry) for name, entry in header.items())
        end = 0
        for begin, following in spans:
            if begin != end:
                raise _damaged(path, "its tensors do not lie end to end")
            end = following
        if end != size - self._data_start:
            raise _damaged(path, f"its tensors have {end} bytes, the file {size - self._data_start} for them")

    def names(self) -> list[str]:
        """Names of the tensors, in file order."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> str:
        """``float32``, ``float16`` or ``bfloat16``."""
        return _DTYPES[self._entries[name]["dtype"]][0]

    def read(self, name: str) -> Array:
        """One tensor as a copy-on-write map of the file."""
        dtype, shape = numpy_dtype(self.dtype(name)), self.shape(name)
        if 0 in shape:
            return np.empty(shape, dtype)
        begin, end = self._entries[name]["data_offsets"]
        return map_bytes(self.path, name, self._data_start + begin, end - begin).view(dtype).reshape(shape)

    def _span(self, name: str, entry: Any) -> tuple[int, int]:
        """Where a tensor begins and ends, as its entry says, which fits its shape."""
        if not isinstance(entry, dict):
            raise _damaged(self.path, f"the entry of {name} is no object")
        shape, offsets, dtype = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
        if not _are_sizes(shape, _MAX_DIMS) or not _are_sizes(offsets, 2) or len(offsets) != 2:
            raise _damaged(self.path, f"the shape or the place of {name} is none")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise unsupported_dtype(self.path, name, str(dtype))
        begin, end = offsets
        if end - begin != math.prod(shape) * _DTYPES[dtype][1]:
            raise _damaged(self.path, f"{name} has {end - begin} bytes, which is not the size of its shape")
        return begin, end


def _are_sizes(value: Any, most: int) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= most and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged or not a safetensors file ({reason})")
