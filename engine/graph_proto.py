"""Reads a serialized ONNX model without the onnx package, as far as exports write one; the rest is refused.

There are no subgraphs, sparse tensors, training information or metadata, and so no fields for them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from cpmbee import wire_format
from cpmbee.wire_format import STRING, Field, Format

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

_MESSAGES = {
    "Model": {
        1: Field("ir_version", wire_format.INT64),
        2: Field("producer_name", STRING),
        3: Field("producer_version", STRING),
        7: Field("graph", "Graph"),
        8: Field("opset_import", "Opset", many=True),
        25: Field("functions", "Function", many=True),
    },
    "Opset": {1: Field("domain", STRING), 2: Field("version", wire_format.INT64)},
    "Graph": {
        1: Field("node", "Node", many=True),
        2: Field("name", STRING),
        5: Field("initializer", "Tensor", many=True),
        11: Field("input", "Value", many=True),
        12: Field("output", "Value", many=True),
    },
    "Function": {
        1: Field("name", STRING),
        4: Field("input", STRING, many=True),
        5: Field("output", STRING, many=True),
        6: Field("attribute", STRING, many=True),
        7: Field("node", "Node", many=True),
        9: Field("opset_import", "Opset", many=True),
        10: Field("domain", STRING),
    },
    "Node": {
        1: Field("input", STRING, many=True),
        2: Field("output", STRING, many=True),
        3: Field("name", STRING),
        4: Field("op_type", STRING),
        5: Field("attribute", "Attribute", many=True),
        7: Field("domain", STRING),
    },
    "Attribute": {
        1: Field("name", STRING),
        2: Field("f", wire_format.FLOAT),
        3: Field("i", wire_format.INT64),
        4: Field("s", STRING),
        5: Field("t", "Tensor"),
        8: Field("ints", wire_format.INT64, many=True),
        20: Field("type", wire_format.INT32),
        21: Field("reference", STRING),
    },
    "Tensor": {
        1: Field("dims", wire_format.INT64, many=True),
        2: Field("data_type", wire_format.INT32),
        4: Field("float_data", wire_format.FLOAT, many=True),
        5: Field("int32_data", wire_format.INT32, many=True),
        7: Field("int64_data", wire_format.INT64, many=True),
        8: Field("name", STRING),
        9: Field("raw_data", wire_format.BYTES),
        13: Field("external_data", "Entry", many=True),
        14: Field("data_location", wire_format.INT32),
    },
    "Entry": {1: Field("key", STRING), 2: Field("value", STRING)},
    "Value": {1: Field("name", STRING), 2: Field("type", "Type")},
    "Type": {1: Field("tensor_type", "TensorType")},
    "TensorType": {1: Field("elem_type", wire_format.INT32), 2: Field("shape", "Shape")},
    "Shape": {1: Field("dim", "Dim", many=True)},
    "Dim": {1: Field("value", wire_format.INT64), 2: Field("param", STRING)},
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
    model: Model = _FORMAT.read(data, "Model")
    return model


def read_function(data: bytes) -> Function:
    """The function in serialized bytes.

    Raises:
        ValueError: as `read_model`.
    """
    function: Function = _FORMAT.read(data, "Function")
    return function


def _model(found: dict[str, Any]) -> Model:
    graph = found.get("graph")
    if graph is None:
        raise ValueError("there is no graph")
    return Model(
        found.get("ir_version", 0),
        tuple(found.get("opset_import", ())),
        tuple(found.get("functions", ())),
        tuple(graph.get("node", ())),
        tuple(graph.get("initializer", ())),
        tuple(graph.get("input", ())),
        tuple(graph.get("output", ())),
    )


def _opset(found: dict[str, Any]) -> tuple[str, int]:
    return found.get("domain", ""), found.get("version", 0)


def _function(found: dict[str, Any]) -> Function:
    return Function(
        found.get("domain", ""),
        found.get("name", ""),
        tuple(found.get("input", ())),
        tuple(found.get("output", ())),
        tuple(found.get("attribute", ())),
        tuple(found.get("opset_import", ())),
        tuple(found.get("node", ())),
    )


def _node(found: dict[str, Any]) -> Node:
    pairs = found.get("attribute", ())
    attributes = dict(pairs)
    if len(attributes) != len(pairs):
        raise ValueError("a node has an attribute twice")
    op, inputs, outputs = found.get("op_type", ""), tuple(found.get("input", ())), tuple(found.get("output", ()))
    return Node(found.get("domain", ""), op, inputs, outputs, attributes)


_FLOAT_TYPE, _INT_TYPE, _STRING_TYPE, _TENSOR_TYPE, _INTS_TYPE = 1, 2, 3, 4, 7
_VALUE_FIELDS = {_FLOAT_TYPE: "f", _INT_TYPE: "i", _STRING_TYPE: "s", _TENSOR_TYPE: "t", _INTS_TYPE: "ints"}


def _attribute(found: dict[str, Any]) -> tuple[str, Attribute]:
    name, kind = found.pop("name", ""), found.pop("type", 0)
    field = "reference" if "reference" in found else _VALUE_FIELDS.get(kind)
    if "ints" in found:
        found["ints"] = tuple(found["ints"])
    if len(found) != 1 or field not in found:
        raise ValueError(f"attribute {name} has no value of its type {kind}, or more than one")
    value: Attribute = Reference(found[field], kind) if field == "reference" else found[field]
    return name, value


_DATA_FORMATS = {FLOAT: ("float_data", "f"), INT64: ("int64_data", "q"), INT32: ("int32_data", "i")}
_DATA_FORMATS |= {UINT8: ("int32_data", "B")}


def _tensor(found: dict[str, Any]) -> Tensor:
    name, dtype, dims = found.get("name", ""), found.get("data_type", 0), tuple(found.get("dims", ()))
    external = tuple((entry.get("key", ""), entry.get("value", "")) for entry in found.get("external_data", ()))
    data = found.get("raw_data")
    lists = [field for field in ("float_data", "int32_data", "int64_data") if field in found]
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
    for dim in tensor["shape"].get("dim", ()):
        if len(dim) != 1:
            raise ValueError(f"{name} is declared with a size that is not one number or one name")
        dims.extend(dim.values())
    return ValueInfo(name, tensor.get("elem_type", 0), tuple(dims))


_FORMAT = Format(
    _MESSAGES,
    {
        "Model": _model,
        "Opset": _opset,
        "Function": _function,
        "Node": _node,
        "Attribute": _attribute,
        "Tensor": _tensor,
        "Value": _value,
    },
)
