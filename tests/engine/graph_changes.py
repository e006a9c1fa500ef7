"""Hostile changes to a graph: each takes a model and a source of random numbers, and changes the model."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto, helper

Random = random.Random
Change = Callable[[onnx.ModelProto, Random], object]

_NUMBERS = (-(1 << 63), -(1 << 31), -3, -2, -1, 0, 1, 2, 3, 7, 32, 1 << 20, (1 << 31) - 1, 1 << 40, (1 << 63) - 1)
_OPERATORS = (
    *(("", op) for op in ("Loop", "If", "Scan", "Identity", "Expand", "Tile", "Pad", "Range", "ConstantOfShape")),
    *(("", op) for op in ("Gather", "GatherND", "ScatterND", "Reshape", "Split", "Concat", "MatMul", "Cast", "Mul")),
    *(("", op) for op in ("Transpose", "Unsqueeze", "Slice", "Resize", "Where", "Shape", "Einsum", "OneHot")),
    *(("com.microsoft", op) for op in ("MatMulNBits", "Attention", "GroupQueryAttention", "Gelu")),
    *(("cpm_bee", op) for op in ("QuantizedLinear", "QuantizedEmbedding", "RMSNorm", "AddRMSNorm", "GatedGelu")),
    *(("cpm_bee", op) for op in ("BucketedAttention", "SubscriptRotation", "BucketedPositionBias")),
    ("evil", "F39"),
)


def change_attribute(model: onnx.ModelProto, rng: Random) -> None:
    node = rng.choice([node for node in model.graph.node if node.attribute])
    attribute = rng.choice(node.attribute)
    if attribute.type == AttributeProto.INT:
        attribute.i = rng.choice((*_NUMBERS, attribute.i + 1, attribute.i - 1, attribute.i * 2))
    elif attribute.type == AttributeProto.FLOAT:
        attribute.f = rng.choice((float("nan"), float("inf"), -1.0, 0.0, 1e38, 1e-45, attribute.f * 2))
    elif attribute.type == AttributeProto.INTS:
        place = rng.randrange(len(attribute.ints))
        attribute.ints[place] = rng.choice(_NUMBERS)


def drop_or_add_attribute(model: onnx.ModelProto, rng: Random) -> None:
    node = rng.choice(model.graph.node)
    if node.attribute and rng.random() < 0.5:
        del node.attribute[rng.randrange(len(node.attribute))]
    else:
        name = rng.choice(("axis", "batch_dims", "allowzero", "to", "keepdims", "evil", "num_outputs", "alpha"))
        node.attribute.append(helper.make_attribute(name, rng.choice((rng.choice(_NUMBERS), 0.5, "text", [1, 2]))))


def change_operator(model: onnx.ModelProto, rng: Random) -> None:
    node = rng.choice(model.graph.node)
    node.domain, node.op_type = rng.choice(_OPERATORS)


def add_node(model: onnx.ModelProto, rng: Random) -> None:
    """Between a value and one of its readers, with inputs of all kinds."""
    domain, op = rng.choice(_OPERATORS)
    values = _values(model)
    place = rng.randrange(len(model.graph.node))
    reader = model.graph.node[place]
    inputs = [rng.choice(reader.input), *rng.choices(values, k=rng.randrange(3))]
    node = helper.make_node(op, inputs, ["added"], domain=domain)
    for name in rng.sample(("axis", "to", "perm", "batch_dims", "num_outputs"), rng.randrange(3)):
        value = list(rng.sample(range(3), 3)) if name == "perm" else rng.choice(_NUMBERS)
        node.attribute.append(helper.make_attribute(name, value))
    reader.input[rng.randrange(len(reader.input))] = "added"
    model.graph.node.insert(place, node)


def reroute(model: onnx.ModelProto, rng: Random) -> None:
    node = rng.choice(model.graph.node)
    node.input[rng.randrange(len(node.input))] = rng.choice(_values(model))


def reroute_among_equals(model: onnx.ModelProto, rng: Random) -> None:
    """To a value that a node of the same operator reads in that place, so that types often fit."""
    node = rng.choice(model.graph.node)
    place = rng.randrange(len(node.input))
    others = [other.input[place] for other in model.graph.node if other.op_type == node.op_type]
    node.input[place] = rng.choice(others)


def change_arity(model: onnx.ModelProto, rng: Random) -> None:
    node = rng.choice(model.graph.node)
    side = rng.choice((node.input, node.output))
    if side and rng.random() < 0.5:
        del side[rng.randrange(len(side))]
    else:
        side.append(rng.choice((*_values(model), "", "new")))


def rename_output(model: onnx.ModelProto, rng: Random) -> None:
    node = rng.choice(model.graph.node)
    name = rng.choice((*_values(model), "", "\0", "x" * 10_000, "_inlfunc_x", "../x"))
    node.output[rng.randrange(len(node.output))] = name


def duplicate_node(model: onnx.ModelProto, rng: Random) -> None:
    node = onnx.NodeProto()
    node.CopyFrom(rng.choice(model.graph.node))
    if rng.random() < 0.7:
        node.name = ""  # ONNX Runtime wants no name twice
        for place, name in enumerate(node.output):
            node.output[place] = f"{name}_again"
    model.graph.node.insert(rng.randrange(len(model.graph.node) + 1), node)


def reorder_nodes(model: onnx.ModelProto, rng: Random) -> None:
    nodes = list(model.graph.node)
    first, second = rng.randrange(len(nodes)), rng.randrange(len(nodes))
    nodes[first], nodes[second] = nodes[second], nodes[first]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def drop_node(model: onnx.ModelProto, rng: Random) -> None:
    del model.graph.node[rng.randrange(len(model.graph.node))]


def many_nodes(model: onnx.ModelProto, rng: Random) -> None:
    """Values that double, or one that is computed over and over."""
    name = rng.choice([name for node in model.graph.node for name in node.output if name])
    op, inputs = rng.choice((("Concat", 2), ("Mul", 2), ("Add", 2), ("Cos", 1), ("Transpose", 1), ("Shape", 1)))
    attributes: dict[str, Any] = {"axis": rng.choice((0, -1))} if op == "Concat" else {}
    if op == "Transpose":
        attributes = {"perm": [0, 2, 1]}
    for step in range(rng.choice((3, 40, 400))):
        model.graph.node.append(helper.make_node(op, [name] * inputs, [f"more.{step}"], **attributes))
        name = f"more.{step}"


def change_dims(model: onnx.ModelProto, rng: Random) -> None:
    tensor = rng.choice([tensor for tensor in model.graph.initializer if tensor.dims])
    place = rng.randrange(len(tensor.dims))
    before = tensor.dims[place]
    tensor.dims[place] = rng.choice((*_NUMBERS, before + 1, before - 1, before * 2, before // 2))
    if rng.random() < 0.3:
        _set(tensor, "length", str(before))


def turn_dims(model: onnx.ModelProto, rng: Random) -> None:
    tensor = rng.choice([tensor for tensor in model.graph.initializer if len(tensor.dims) > 1])
    dims = rng.sample(list(tensor.dims), len(tensor.dims))
    del tensor.dims[:]
    tensor.dims.extend(dims)


def change_place(model: onnx.ModelProto, rng: Random) -> None:
    tensor = rng.choice([tensor for tensor in model.graph.initializer if tensor.external_data])
    key = rng.choice(("offset", "length", "location", "checksum"))
    texts = [str(number) for number in (*_NUMBERS, 1, 4095, 4096, 8192, 1 << 62)]
    texts += [
        "",
        " 4096",
        "0x10",
        "1e3",
        "4_096",
        "+4096",
        "٤",
        "../model.onnx.data",
        "*/_ORT_MEM_ADDR_/*",
        "vocab.txt",
    ]
    _set(tensor, key, rng.choice(texts))


def swap_places(model: onnx.ModelProto, rng: Random) -> None:
    """Two tensors lie at one place, or each where the other was."""
    first, second = rng.sample([tensor for tensor in model.graph.initializer if tensor.external_data], 2)
    places = [entry.value for entry in first.external_data]
    for entry, other in zip(first.external_data, second.external_data, strict=True):
        entry.value = other.value
    if rng.random() < 0.5:
        for entry, value in zip(second.external_data, places, strict=True):
            entry.value = value


def change_dtype(model: onnx.ModelProto, rng: Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    tensor.data_type = rng.choice((0, *range(1, 24), 99))
    if rng.random() < 0.3:
        rng.choice((*model.graph.input, *model.graph.output)).type.tensor_type.elem_type = tensor.data_type


def change_constant(model: onnx.ModelProto, rng: Random) -> None:
    tensor = rng.choice([tensor for tensor in model.graph.initializer if not tensor.external_data])
    if tensor.data_type == TensorProto.INT64:
        values = [rng.choice(_NUMBERS) for _ in range(len(tensor.raw_data) // 8)]
        tensor.raw_data = b"".join(value.to_bytes(8, "little", signed=True) for value in values)
    else:
        tensor.raw_data = rng.choice(
            (tensor.raw_data[:-1], tensor.raw_data * 2, b"", rng.randbytes(len(tensor.raw_data)))
        )


def change_declaration(model: onnx.ModelProto, rng: Random) -> None:
    value = rng.choice((*model.graph.input, *model.graph.output))
    dims = value.type.tensor_type.shape.dim
    dim = rng.choice(dims)
    if rng.random() < 0.5:
        dim.dim_param = rng.choice("BQKREP")
    else:
        dim.dim_value = rng.choice(_NUMBERS)
    if rng.random() < 0.3:
        dims.add().dim_value = 1
    if rng.random() < 0.2:
        value.name = rng.choice(_values(model))


def grow(model: onnx.ModelProto, rng: Random) -> None:
    """What exports write, where they do not: a runtime has to survive it."""
    place = rng.randrange(len(model.graph.node))
    reader = model.graph.node[place]
    at = rng.randrange(len(reader.input))
    name = reader.input[at]
    new = f"{name}.grown{len(model.graph.node)}"
    casts = [helper.make_node("Cast", [name], [f"{new}.half"], to=TensorProto.FLOAT16)]
    casts.append(helper.make_node("Cast", [f"{new}.half"], [new], to=TensorProto.FLOAT))
    halves = [f"{new}.first", f"{new}.second"]
    split = helper.make_node("Split", [name], halves, axis=-1, num_outputs=2)
    turn = helper.make_node("Transpose", [name], [f"{new}.turned"], perm=[2, 0, 1])
    choices = [
        [helper.make_node("Mul", [name, name], [new])],
        [helper.make_node("Add", [name, name], [new])],
        [helper.make_node("Sin", [name], [new])],
        [helper.make_node("Gelu", [name], [new], domain="com.microsoft")],
        casts,
        [split, helper.make_node("Concat", halves[::-1], [new], axis=-1)],
        [split, helper.make_node("Add", halves, [new])],
        [turn, helper.make_node("Transpose", [f"{new}.turned"], [new], perm=[1, 2, 0])],
    ]
    reader.input[at] = new
    for node in reversed(rng.choice(choices)):
        model.graph.node.insert(place, node)


def change_body(model: onnx.ModelProto, rng: Random) -> None:
    body = rng.choice(model.functions)
    part = onnx.ModelProto()
    part.graph.node.extend(body.node)
    rng.choice((change_attribute, change_operator, reroute, drop_node, duplicate_node, reorder_nodes))(part, rng)
    del body.node[:]
    body.node.extend(part.graph.node)


def change_functions(model: onnx.ModelProto, rng: Random) -> None:
    first, second = rng.sample(range(len(model.functions)), 2)
    choice = rng.randrange(4)
    if choice == 0:
        del model.functions[first]
    elif choice == 1:
        model.functions.append(model.functions[first])
    elif choice == 2:
        model.functions[first].name, model.functions[second].name = (
            model.functions[second].name,
            model.functions[first].name,
        )
    else:
        for step in range(40):
            name = f"F{step - 1}"
            inner = (
                helper.make_node(name, ["x"], ["t"], domain="evil"),
                helper.make_node(name, ["t"], ["y"], domain="evil"),
            )
            model.functions.append(helper.make_function("evil", f"F{step}", ["x"], ["y"], inner, model.opset_import))


def change_versions(model: onnx.ModelProto, rng: Random) -> None:
    if rng.random() < 0.5:
        rng.choice(model.opset_import).version = rng.choice((*_NUMBERS, *range(1, 25)))
    else:
        model.ir_version = rng.choice(_NUMBERS)


def add_surprise(model: onnx.ModelProto, rng: Random) -> None:
    """What no export writes: subgraphs, sparse tensors, training, metadata, descriptions."""
    choice = rng.randrange(6)
    tensor = helper.make_tensor("sparse", TensorProto.FLOAT, [1], [1.0])
    if choice == 0:
        model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    elif choice == 1:
        model.training_info.add().initialization.CopyFrom(model.graph)
    elif choice == 2:
        model.metadata_props.add(key="ort.config", value="{}")
    elif choice == 3:
        rng.choice(model.graph.node).attribute.append(helper.make_attribute("body", onnx.GraphProto(name="g")))
    elif choice == 4:
        rng.choice(model.graph.node).doc_string = "x"
    else:
        model.graph.quantization_annotation.add(tensor_name="embedding")


def swap_weights(model: onnx.ModelProto, rng: Random) -> None:
    """A block reads the weights of another."""
    names = [tensor.name for tensor in model.graph.initializer]
    first, second = rng.sample(names, 2)
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name in (first, second):
                node.input[place] = second if name == first else first


CHANGES: tuple[Change, ...] = (
    *(change_attribute, drop_or_add_attribute, change_operator, add_node, reroute, reroute_among_equals, change_arity),
    *(rename_output, duplicate_node, reorder_nodes, drop_node, many_nodes, change_dims, turn_dims, change_place),
    *(swap_places, change_dtype, change_constant, change_declaration, change_body, change_functions, change_versions),
    *(add_surprise, swap_weights, reroute_among_equals, grow, grow, grow, grow),
)


def change_bytes(content: bytes, rng: Random) -> bytes:
    """Some bytes overwritten, inserted, removed or repeated."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(data))
        length = rng.choice((1, 1, 2, 16))
        choice = rng.randrange(5)
        if choice == 0:
            data[place] = rng.randrange(256)
        elif choice == 1:
            data[place] ^= 1 << rng.randrange(8)
        elif choice == 2:
            data[place:place] = rng.randbytes(length)
        elif choice == 3:
            del data[place : place + length]
        else:
            data[place:place] = data[place : place + 64]
    return bytes(data)


def mutated(content: bytes, rng: Random) -> bytes:
    """A serialized model with a few changes."""
    if rng.random() < 0.2:
        return change_bytes(content, rng)
    model = onnx.ModelProto()
    model.ParseFromString(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        with contextlib.suppress(ValueError, IndexError):  # nothing left to change, or a number that no field holds
            rng.choice(CHANGES)(model, rng)
    return model.SerializeToString()


def _values(model: onnx.ModelProto) -> list[str]:
    names = [value.name for value in (*model.graph.input, *model.graph.initializer)]
    return [*names, *(name for node in model.graph.node for name in node.output)] or ["x"]


def _set(tensor: TensorProto, key: str, value: str) -> None:
    for entry in tensor.external_data:
        if entry.key == key:
            entry.value = value
            return
    tensor.external_data.add(key=key, value=value)
