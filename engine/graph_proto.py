"""Reads a serialized ONNX model without the onnx package: what protobuf would see, or a refusal.

ONNX Runtime must not find anything in the bytes that was not looked at, so what this reader does not know, what occurs
twice where one is meant, and what protobuf would cut or interpret is refused. Each byte is read once.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

FLOAT, UINT8, INT8, INT16, INT32, INT64, FLOAT16 = 1, 2, 3, 5, 6, 7, 10  # of TensorProto.DataType
ITEM_SIZES = {FLOAT: 4, UINT8: 1, INT8: 1, INT16: 2, INT32: 4, INT64: 8, FLOAT16: 2}
DTYPE_NAMES = {
    FLOAT: "float32",
    UINT8: "uint8",
    INT8: "int8",
    INT16: "int16",
    INT32: "int32",
    INT64: "int64",
    FLOAT16: "float16",
}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_INT32, _INT64, _FLOAT, _STRING, _RAW = "int32", "int64", "float", "string", "bytes"
_WIRES = {_INT32: _VARINT, _INT64: _VARINT, _FLOAT: _FIXED32}  # all else is a string of bytes
_MESSAGES: dict[str, dict[int, tuple[str, str]]] = {
    # message: field number -> (name, type); a name that ends in * may occur many times
    "Model": {
        1: ("ir_version", _INT64),
        2: ("producer_name", _STRING),
        3: ("producer_version", _STRING),
        7: ("graph", "Graph"),
        8: ("opset_import*", "Opset"),
        25: ("functions*", "Function"),
    },
    "Opset": {1: ("domain", _STRING), 2: ("version", _INT64)},
    "Graph": {
        1: ("node*", "Node"),
        2: ("name", _STRING),
        5: ("initializer*", "Tensor"),
        11: ("input*", "Value"),
        12: ("output*", "Value"),
    },
    "Function": {
        1: ("name", _STRING),
        4: ("input*", _STRING),
        5: ("output*", _STRING),
        6: ("attribute*", _STRING),
        7: ("node*", "Node"),
        9: ("opset_import*", "Opset"),
        10: ("domain", _STRING),
    },
    "Node": {
        1: ("input*", _STRING),
        2: ("output*", _STRING),
        3: ("name", _STRING),
        4: ("op_type", _STRING),
        5: ("attribute*", "Attribute"),
        7: ("domain", _STRING),
    },
    "Attribute": {
        1: ("name", _STRING),
        2: ("f", _FLOAT),
        3: ("i", _INT64),
        4: ("s", _STRING),
        5: ("t", "Tensor"),
        8: ("ints*", _INT64),
        20: ("type", _INT32),
        21: ("reference", _STRING),
    },
    "Tensor": {
        1: ("dims*", _INT64),
        2: ("data_type", _INT32),
        4: ("float_data*", _FLOAT),
        5: ("int32_data*", _INT32),
        7: ("int64_data*", _INT64),
        8: ("name", _STRING),
        9: ("raw_data", _RAW),
        13: ("external_data*", "Entry"),
        14: ("data_location", _INT32),
    },
    "Entry": {1: ("key", _STRING), 2: ("value", _STRING)},
    "Value": {1: ("name", _STRING), 2: ("type", "Type")},
    "Type": {1: ("tensor_type", "TensorType")},
    "TensorType": {1: ("elem_type", _INT32), 2: ("shape", "Shape")},
    "Shape": {1: ("dim*", "Dim")},
    "Dim": {1: ("value", _INT64), 2: ("param", _STRING)},
}


class Tensor(NamedTuple):
    """A tensor that a graph stores.

    Attributes:
        name: of the value.
        dtype: number of its ``DataType``.
        dims: its shape.
        data: the bytes of its numbers, little-endian, where they are in the graph.
        external: keys and values that say where they are else.
    """

    name: str
    dtype: int
    dims: tuple[int, ...]
    data: bytes | None
    external: tuple[tuple[str, str], ...]


class Reference(NamedTuple):
    """The value of an attribute in a function's body that the calling node sets.

    Attributes:
        name: of the calling node's attribute.
        type: number of its ``AttributeType``.
    """

    name: str
    type: int


Attribute = float | int | str | tuple[int, ...] | Tensor | Reference


class Node(NamedTuple):
    """One operation."""

    domain: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]


class ValueInfo(NamedTuple):
    """What a graph declares of an input or output; a dim is a number or a name."""

    name: str
    dtype: int
    dims: tuple[int | str, ...]


class Function(NamedTuple):
    """An operator written in others."""

    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[str, ...]
    opsets: tuple[tuple[str, int], ...]
    nodes: tuple[Node, ...]


class Model(NamedTuple):
    """Everything in a model file that matters to a runtime."""

    ir_version: int
    opsets: tuple[tuple[str, int], ...]
    functions: tuple[Function, ...]
    nodes: tuple[Node, ...]
    initializers: tuple[Tensor, ...]
    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]


def read_model(data: bytes) -> Model:
    """The model in a file's bytes.

    Raises:
        ValueError: the bytes are damaged, or hold something that no export writes; says what.
    """
    try:
        return _model(_message(data, 0, len(data), "Model"))
    except (IndexError, struct.error):
        raise ValueError("cut off") from None
    except UnicodeDecodeError:
        raise ValueError("a name is not UTF-8") from None


class _Field(NamedTuple):
    name: str
    type: str
    many: bool
    packed: bool  # several numbers in one string of bytes


def _keys(fields: Mapping[int, tuple[str, str]]) -> dict[int, _Field]:
    """Fields by what stands before them in the file: number and wire type."""
    keys = {}
    for number, (name, kind) in fields.items():
        many, wire = name.endswith("*"), _WIRES.get(kind, _BYTES)
        keys[number << 3 | wire] = _Field(name.rstrip("*"), kind, many, packed=False)
        if many and wire != _BYTES:
            keys[number << 3 | _BYTES] = _Field(name.rstrip("*"), kind, many, packed=True)
    return keys


_KEYS = {message: _keys(fields) for message, fields in _MESSAGES.items()}
_MANY = {
    message: [name.rstrip("*") for name, _ in fields.values() if name.endswith("*")]
    for message, fields in _MESSAGES.items()
}


def _message(data: bytes, at: int, end: int, message: str) -> dict[str, Any]:
    """The fields of a message by name; those that may occur many times as lists."""
    keys = _KEYS[message]
    found: dict[str, Any] = {name: [] for name in _MANY[message]}
    value: Any
    while at < end:
        key = data[at]
        at += 1
        if key > 0x7F:
            key, at = _varint(data, at - 1)
        field = keys.get(key)
        if field is None:
            raise ValueError(f"{message} has a field {key >> 3} of wire type {key & 7}, which no export writes")
        name, kind, many, packed = field
        if key & 7 == _BYTES:
            size = data[at]
            at += 1
            if size > 0x7F:
                size, at = _varint(data, at - 1)
            stop = at + size
            if stop > end:
                raise ValueError("cut off")
            if kind == _STRING:
                value = str(data[at:stop], "utf-8")
            elif packed:
                found[name] += _numbers(data, at, stop, kind)
                at = stop
                continue
            elif kind == _RAW:
                value = data[at:stop]
            else:
                value = _BUILD.get(kind, _same)(_message(data, at, stop, kind))
            at = stop
        else:
            value, at = _number(data, at, kind)
        if many:
            found[name].append(value)
        elif name in found:
            raise ValueError(f"{message} has two values for {name}")
        else:
            found[name] = value
    if at > end:
        raise ValueError("cut off")
    return found


def _numbers(data: bytes, at: int, end: int, kind: str) -> list[int | float]:
    values = []
    while at < end:
        value, at = _number(data, at, kind)
        values.append(value)
    if at > end:
        raise ValueError("cut off")
    return values


def _number(data: bytes, at: int, kind: str) -> tuple[int | float, int]:
    if kind == _FLOAT:
        (real,) = struct.unpack_from("<f", data, at)
        return real, at + 4
    value = data[at]
    at += 1
    if value > 0x7F:
        value, at = _varint(data, at - 1)
        if value >= 1 << 63:
            value -= 1 << 64
    if kind == _INT32 and not -1 << 31 <= value < 1 << 31:  # protobuf would cut it
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


def _same(found: dict[str, Any]) -> dict[str, Any]:
    return found


def _model(found: dict[str, Any]) -> Model:
    graph = found.get("graph")
    if graph is None:
        raise ValueError("there is no graph")
    return Model(
        found.get("ir_version", 0),
        tuple(found["opset_import"]),
        tuple(found["functions"]),
        tuple(graph["node"]),
        tuple(graph["initializer"]),
        tuple(graph["input"]),
        tuple(graph["output"]),
    )


def _opset(found: dict[str, Any]) -> tuple[str, int]:
    return found.get("domain", ""), found.get("version", 0)


def _function(found: dict[str, Any]) -> Function:
    return Function(
        found.get("domain", ""),
        found.get("name", ""),
        tuple(found["input"]),
        tuple(found["output"]),
        tuple(found["attribute"]),
        tuple(found["opset_import"]),
        tuple(found["node"]),
    )


def _node(found: dict[str, Any]) -> Node:
    attributes = dict(found["attribute"])
    if len(attributes) != len(found["attribute"]):
        raise ValueError("a node has an attribute twice")
    op, inputs, outputs = found.get("op_type", ""), tuple(found["input"]), tuple(found["output"])
    return Node(found.get("domain", ""), op, inputs, outputs, attributes)


_FLOAT_TYPE, _INT_TYPE, _STRING_TYPE, _TENSOR_TYPE, _INTS_TYPE = 1, 2, 3, 4, 7
_VALUE_FIELDS = {_FLOAT_TYPE: "f", _INT_TYPE: "i", _STRING_TYPE: "s", _TENSOR_TYPE: "t", _INTS_TYPE: "ints"}


def _attribute(found: dict[str, Any]) -> tuple[str, Attribute]:
    name, kind = found.pop("name", ""), found.pop("type", 0)
    field = "reference" if "reference" in found else _VALUE_FIELDS.get(kind)
    ints = tuple(found.pop("ints"))
    if ints or field == "ints":
        found["ints"] = ints
    if len(found) != 1 or field not in found:
        raise ValueError(f"attribute {name} has no value of its type {kind}, or more than one")
    value: Attribute = Reference(found[field], kind) if field == "reference" else found[field]
    return name, value


_DATA_FORMATS = {FLOAT: ("float_data", "f"), INT64: ("int64_data", "q"), INT32: ("int32_data", "i")}
_DATA_FORMATS |= {UINT8: ("int32_data", "B")}


def _tensor(found: dict[str, Any]) -> Tensor:
    name, dtype, dims = found.get("name", ""), found.get("data_type", 0), tuple(found["dims"])
    external = tuple((entry.get("key", ""), entry.get("value", "")) for entry in found["external_data"])
    data = found.get("raw_data")
    lists = [field for field in ("float_data", "int32_data", "int64_data") if found[field]]
    if lists and data is None:
        field, letter = _DATA_FORMATS.get(dtype, ("", ""))
        if lists != [field]:
            raise ValueError(f"tensor {name} has its numbers in a field that is not for its type")
        data = struct.pack(f"<{len(found[field])}{letter}", *found[field])
    elif lists:
        raise ValueError(f"tensor {name} has its numbers twice")
    if found.get("data_location", 0) != bool(external) or (external and data is not None):
        raise ValueError(f"tensor {name} does not say where its numbers are")
    return Tensor(name, dtype, dims, data, external)


def _value(found: dict[str, Any]) -> ValueInfo:
    name = found.get("name", "")
    tensor = found.get("type", {}).get("tensor_type", {})
    if "shape" not in tensor:
        raise ValueError(f"{name} is declared without a shape")
    dims = []
    for dim in tensor["shape"]["dim"]:
        if len(dim) != 1:
            raise ValueError(f"{name} is declared with a size that is not one number or one name")
        dims.extend(dim.values())
    return ValueInfo(name, tensor.get("elem_type", 0), tuple(dims))


_BUILD = {
    "Opset": _opset,
    "Function": _function,
    "Node": _node,
    "Attribute": _attribute,
    "Tensor": _tensor,
    "Value": _value,
}
