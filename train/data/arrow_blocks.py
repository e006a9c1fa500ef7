"""What an Arrow file says about its record batches before any of them is read: whether reading it could unfold.

Arrow's reader decompresses a batch as soon as it is asked for it, to whatever size the file states. pyarrow does not
tell beforehand, so the few fields that say so are read here, from the same places where Arrow finds them
(https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format; the tables are FlatBuffers).
"""

from __future__ import annotations

import struct
from typing import Any

_END = struct.Struct("<i6s")  # length of the footer, magic number
_MAGIC = b"ARROW1"
_CONTINUATION = -1
_RECORD_BATCH = 3
# Numbers of fields in their tables.
_DICTIONARIES, _RECORD_BATCHES = 2, 3  # Footer
_HEADER_TYPE, _HEADER = 1, 2  # Message
_COMPRESSION = 3  # RecordBatch
_BLOCK_BYTES = 24


def unfolds(content: Any) -> bool:
    """Whether an Arrow file has compressed batches, or dictionaries, of which ours have none.

    Args:
        content: the file, mapped or as bytes.

    Raises:
        struct.error: it is no Arrow file.
    """
    length, magic = _read(_END.format, content, len(content) - _END.size)
    footer = _follow(content, len(content) - _END.size - length)
    if magic != _MAGIC or _vector(content, footer, _DICTIONARIES)[1]:
        return True
    first, count = _vector(content, footer, _RECORD_BATCHES)
    return any(_is_compressed(content, *_read("<q", content, first + i * _BLOCK_BYTES)) for i in range(count))


def _is_compressed(content: Any, begin: int) -> bool:
    (mark,) = _read("<i", content, begin)
    message = _follow(content, begin + (8 if mark == _CONTINUATION else 4))
    kind, header = _field(content, message, _HEADER_TYPE), _field(content, message, _HEADER)
    if kind is None or header is None or _read("<B", content, kind) != (_RECORD_BATCH,):
        return True
    return _field(content, _follow(content, header), _COMPRESSION) is not None


def _follow(content: Any, place: int) -> int:
    """Where the offset at a place leads."""
    return place + int(_read("<I", content, place)[0])


def _field(content: Any, table: int, number: int) -> int | None:
    """Where a table's field is; None where it has its default."""
    vtable = table - int(_read("<i", content, table)[0])
    entry = 4 + 2 * number
    if entry + 2 > _read("<H", content, vtable)[0]:
        return None
    (offset,) = _read("<H", content, vtable + entry)
    return table + offset if offset else None


def _vector(content: Any, table: int, number: int) -> tuple[int, int]:
    """Where a vector's first element is, and how many it has."""
    field = _field(content, table, number)
    if field is None:
        return 0, 0
    place = _follow(content, field)
    return place + 4, _read("<I", content, place)[0]


def _read(layout: str, content: Any, place: int) -> tuple[Any, ...]:
    if place < 0:  # struct would count it from the end
        raise struct.error("before the file")
    return struct.unpack_from(layout, content, place)
