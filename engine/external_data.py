"""Where an ONNX file says its weights are: found by walking the protobuf wire format, without the onnx package.

ONNX Runtime opens whatever file an external tensor names, so the names are looked at before it sees the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from cpmbee.errors import ModelFolderError

MAX_NESTING = 64  # graphs in attributes of nodes in graphs

# For each message, the fields that lead to tensors: field number -> message.
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "StringPair"},
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class ExternalData(NamedTuple):
    """What one tensor says about its data.

    Attributes:
        location: a file name.
        end: bytes that the file must have at least; 0 where the tensor does not say.
    """

    location: str
    end: int


def external_data(model: memoryview) -> Iterator[ExternalData]:
    """Every external tensor of a serialized ONNX model, in graphs, functions, subgraphs and attributes.

    Raises:
        ModelFolderError: the bytes are not a protobuf message of that shape.
    """
    try:
        yield from _walk(model, "Model", 0)
    except (IndexError, UnicodeDecodeError, ValueError) as error:
        raise ModelFolderError(f"not an ONNX model, or a damaged one ({error})") from None


def _walk(data: memoryview, message: str, depth: int) -> Iterator[ExternalData]:
    if depth > 4 * MAX_NESTING:
        raise ValueError("nested too deep")
    known = _FIELDS[message]
    pairs: dict[str, str] = {}
    for number, value in _fields(data):
        inner = known.get(number)
        if inner is None or value is None:
            continue
        if inner == "StringPair":
            pair = {n: bytes(v).decode() for n, v in _fields(value) if v is not None}
            pairs[pair.get(1, "")] = pair.get(2, "")
        else:
            yield from _walk(value, inner, depth + 1)
    if pairs:
        offset, length = int(pairs.get("offset", "0")), int(pairs.get("length", "0"))
        if offset < 0 or length < 0:
            raise ValueError("external data at a negative offset")
        yield ExternalData(pairs.get("location", ""), offset + length)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | None]]:
    """(number, content) of each field; None for what is not a string of bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key >> 32:  # protobuf drops those bits, and would see another field
            raise ValueError("field number too long")
        number, kind = key >> 3, key & 7
        if kind == _BYTES:
            size, at = _varint(data, at)
            if size > len(data) - at:
                raise ValueError("cut off")
            yield number, data[at : at + size]
            at += size
        elif kind == _VARINT:
            _, at = _varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
    if at > len(data):
        raise ValueError("cut off")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("number too long")
