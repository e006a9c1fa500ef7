"""Where the records of a zip archive lie in its file, for archives that store them as they are.

Nothing can unfold: records are neither compressed nor do they overlap, and all of them lie in the file.
"""

from __future__ import annotations

import os
import struct
from itertools import pairwise
from typing import BinaryIO, NamedTuple

from cpmbee.model.pickle_machine import BadPickle

ZIP_MAGIC = b"PK\x03\x04"
_MAX_DIRECTORY = 16 << 20  # bytes; a record takes about a hundred
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s4x2H8x2L3H8xL")
_LOCAL = struct.Struct("<4s5H3L2H")
_IN_EXTRA = 0xFFFFFFFF  # what stands in a field of 32 bits whose value needs 64
_EXTRA64 = 1


class Record(NamedTuple):
    """Where a record's bytes are.

    Attributes:
        begin: offset in the file.
        size: bytes.
    """

    begin: int
    size: int


def read_directory(file: BinaryIO, size: int) -> dict[str, Record]:
    """The records of an archive by their names.

    Args:
        file: the archive.
        size: of the file in bytes.

    Raises:
        BadArchive: its directory is damaged, or a record is compressed, encrypted, outside of the file or on another.
        struct.error: the directory is cut off.
    """
    begin, length = _find_directory(file, size)
    if length > _MAX_DIRECTORY or begin + length > size:
        raise BadArchive("its directory is too large")
    directory = read_at(file, begin, length)
    records: dict[str, Record] = {}
    spans = []
    position = 0
    while position < length:
        signature, flags, method, packed, plain, names, extras, comment, offset = _ENTRY.unpack_from(
            directory, position
        )
        if signature != b"PK\x01\x02":
            raise BadArchive("its directory is damaged")
        position += _ENTRY.size
        name = directory[position : position + names].decode("utf-8", "backslashreplace")
        extra = directory[position + names : position + names + extras]
        position += names + extras + comment
        plain, packed, offset = _wide(extra, [plain, packed, offset])
        if method != 0 or flags & 1 or plain != packed:
            raise BadArchive(f"its record {name} is compressed or encrypted, which torch never does")
        if name in records:
            raise BadArchive(f"its record {name} is there twice")
        local = _LOCAL.unpack(read_at(file, offset, _LOCAL.size))
        first = offset + _LOCAL.size + local[-2] + local[-1]
        if local[0] != ZIP_MAGIC or first + plain > begin:
            raise BadArchive(f"its record {name} lies outside of the file")
        records[name] = Record(first, plain)
        spans.append((offset, first + plain))
    spans.sort()
    if any(end > following for (_, end), (following, _) in pairwise(spans)):
        raise BadArchive("its records lie on each other")
    return records


class BadArchive(BadPickle):
    """An archive that is damaged, or stored in a way that could unfold."""


def _find_directory(file: BinaryIO, size: int) -> tuple[int, int]:
    """Where the directory begins, and its length."""
    tail_begin = max(0, size - _END.size - 0xFFFF)  # a comment may follow
    tail = read_at(file, tail_begin, size - tail_begin)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0:
        raise BadArchive("it is cut off: its directory is missing")
    _, _, _, _, _, length, begin, _ = _END.unpack_from(tail, end)
    if end >= _LOCATOR64.size:
        signature, _, where, _ = _LOCATOR64.unpack_from(tail, end - _LOCATOR64.size)
        if signature == b"PK\x06\x07":
            wide = _END64.unpack(read_at(file, where, _END64.size))
            if wide[0] != b"PK\x06\x06":
                raise BadArchive("its directory is damaged")
            length, begin = wide[-2:]
    return begin, length


def _wide(extra: bytes, values: list[int]) -> list[int]:
    """Sizes and offset of an entry, those of 64 bits from its extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4
        if kind == _EXTRA64:
            inner = position
            for i, value in enumerate(values):
                if value == _IN_EXTRA:
                    (values[i],) = struct.unpack_from("<Q", extra, inner)
                    inner += 8
            break
        position += length
    return values


def read_at(file: BinaryIO, begin: int, length: int) -> bytes:
    """Some bytes of a file.

    Raises:
        struct.error: they are not there.
    """
    content = os.pread(file.fileno(), length, begin) if begin < 1 << 62 else b""  # an offset has 63 bits
    if len(content) != length:
        raise struct.error("cut off")
    return content
