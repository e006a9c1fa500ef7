"""Writes GGUF files, the format of llama.cpp: a header, metadata, a list of tensors, aligned data."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

VERSION = 3
ALIGNMENT = 32


class TensorType(NamedTuple):
    """How a tensor's numbers are stored.

    Attributes:
        code: the format's number for it.
        numbers: in one block.
        size: bytes of one block.
    """

    code: int
    numbers: int
    size: int


F32 = TensorType(0, 1, 4)
F16 = TensorType(1, 1, 2)
Q4_0 = TensorType(2, 32, 18)
Q8_0 = TensorType(8, 32, 34)


@dataclass(frozen=True)
class Tensor:
    """One tensor to be written.

    Attributes:
        name: as llama.cpp calls it.
        shape: (rows, numbers in a row) or (numbers,); a row is a whole number of blocks.
        kind: of storage.
    """

    name: str
    shape: tuple[int, ...]
    kind: TensorType

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        *rows, columns = self.shape
        if columns % self.kind.numbers:
            raise ValueError(f"{self.name}: a row of {columns} numbers is not made of blocks of {self.kind.numbers}")
        size = columns // self.kind.numbers * self.kind.size
        return size * (rows[0] if rows else 1)


class GgufFile:
    """A file being written: all metadata first, then the tensors' data one by one, in order."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def header(self, metadata: Mapping[str, str | int | float], tensors: Sequence[Tensor]) -> None:
        """Write everything that comes before the data."""
        parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
        for key, value in metadata.items():
            parts += [_string(key), _value(value)]
        offset = 0
        for tensor in tensors:
            dimensions = tensor.shape[::-1]  # the fastest first
            parts += [_string(tensor.name), struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)]
            parts.append(struct.pack("<IQ", tensor.kind.code, offset))
            offset += tensor.nbytes + -tensor.nbytes % ALIGNMENT
        self._file.write(b"".join(parts))
        self._pad()

    def data(self, pieces: Iterable[memoryview]) -> None:
        """Write the data of the next tensor."""
        for piece in pieces:
            self._file.write(piece)
        self._pad()

    def _pad(self) -> None:
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))


def write(
    path: Path,
    metadata: Mapping[str, str | int | float],
    tensors: Iterable[tuple[Tensor, Iterable[memoryview]]],
) -> None:
    """Write a file; each tensor comes with its data in pieces."""
    pairs = list(tensors)
    with path.open("wb") as raw:
        file = GgufFile(raw)
        file.header(metadata, [tensor for tensor, _ in pairs])
        for _, pieces in pairs:
            file.data(pieces)


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: str | int | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    return struct.pack("<If", 6, value)
