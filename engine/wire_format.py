"""The wire format of protobuf, read as strictly as it can be: what a message may hold is written in a table.

A runtime must not see anything in the bytes that was not looked at. So a field that the table does not know, one that
occurs twice where one is meant, and a number that protobuf would cut or write shorter are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any, NamedTuple

INT32, INT64, FLOAT, STRING, BYTES = "int32", "int64", "float", "string", "bytes"
MAX_MESSAGES = 1 << 18  # in one; a model of a hundred layers has some ten thousand
_VARINT, _LENGTH, _FIXED32 = 0, 2, 5
_WIRES = {INT32: _VARINT, INT64: _VARINT, FLOAT: _FIXED32}  # all else says its length


class Field(NamedTuple):
    """One field of a message.

    Attributes:
        name: of the field.
        type: of a number or text, or the name of a message.
        many: whether it may occur many times.
    """

    name: str
    type: str
    many: bool = False


class Format:
    """Messages that refer to each other.

    Args:
        messages: for each message its fields by number.
        build: what becomes of the fields that a message has, by name, those that may occur many times as lists; without
            an entry, they are kept as they are.
    """

    def __init__(
        self, messages: Mapping[str, Mapping[int, Field]], build: Mapping[str, Callable[[dict[str, Any]], Any]]
    ) -> None:
        self._keys = {message: _keys(fields) for message, fields in messages.items()}
        self._build = build

    def read(self, data: bytes, message: str) -> Any:
        """A message that takes all of ``data``.

        Raises:
            ValueError: the bytes are damaged, or hold something that the table does not know; says what.
        """
        try:
            return self._read(data, 0, len(data), message, count(1))
        except (IndexError, struct.error):
            raise ValueError("cut off") from None
        except UnicodeDecodeError:
            raise ValueError("a name is not UTF-8") from None

    def _read(self, data: bytes, at: int, end: int, message: str, numbers: Iterator[int]) -> Any:
        if next(numbers) > MAX_MESSAGES:
            raise ValueError(f"more than {MAX_MESSAGES} messages")
        keys = self._keys[message]
        found: dict[str, Any] = {}
        value: Any
        while at < end:
            key = data[at]
            at += 1
            if key > 0x7F:
                key, at = _varint(data, at - 1)
            field = keys.get(key)
            if field is None:
                raise ValueError(f"{message} has a field {key >> 3} of wire type {key & 7}, which no export writes")
            name, kind, many = field
            if key & 7 == _LENGTH:
                size = data[at]
                at += 1
                if size > 0x7F:
                    size, at = _varint(data, at - 1)
                stop = at + size
                if stop > end:
                    raise ValueError("cut off")
                if kind == STRING:
                    value = str(data[at:stop], "utf-8")
                elif kind == BYTES:
                    value = data[at:stop]
                elif kind in _WIRES:  # several numbers
                    found.setdefault(name, []).extend(_numbers(data, at, stop, kind))
                    at = stop
                    continue
                else:
                    value = self._read(data, at, stop, kind, numbers)
                at = stop
            else:
                value, at = _number(data, at, kind)
            if many:
                if name in found:
                    found[name].append(value)
                else:
                    found[name] = [value]
            elif name in found:
                raise ValueError(f"{message} has two values for {name}")
            else:
                found[name] = value
        if at > end:
            raise ValueError("cut off")
        build = self._build.get(message)
        return found if build is None else build(found)


def _keys(fields: Mapping[int, Field]) -> dict[int, Field]:
    """Fields by what stands before them: number and wire type."""
    keys = {number << 3 | _WIRES.get(field.type, _LENGTH): field for number, field in fields.items()}
    packed = {number << 3 | _LENGTH: field for number, field in fields.items() if field.many}
    return {**keys, **packed}


def _numbers(data: bytes, at: int, end: int, kind: str) -> list[int | float]:
    values = []
    while at < end:
        value, at = _number(data, at, kind)
        values.append(value)
    if at > end:
        raise ValueError("cut off")
    return values


def _number(data: bytes, at: int, kind: str) -> tuple[int | float, int]:
    if kind == FLOAT:
        (real,) = struct.unpack_from("<f", data, at)
        return real, at + 4
    value = data[at]
    at += 1
    if value > 0x7F:
        value, at = _varint(data, at - 1)
        if value >= 1 << 63:
            value -= 1 << 64
    if kind == INT32 and not -1 << 31 <= value < 1 << 31:  # protobuf would cut it
        raise ValueError("a number is too large")
    return value, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if not byte and shift:
                raise ValueError("a number is longer than it need be")
            if value >> 64:
                raise ValueError("a number is too long")
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
