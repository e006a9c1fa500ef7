"""Writes a Llama of random weights in the format of onnxruntime-genai, piece by piece, so that memory stays small."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from cpmbee.bench.peers.protocol import BLOCK, LlamaShape, UnavailableError

HEAD_BITS = 8
DEVIATION = {4: 4.6, 8: 73.9}  # of evenly drawn quants
ALIGNMENT = 4096
CONTEXT = 8192
OPSET, MICROSOFT_OPSET = 21, 1
RANDOM_BYTES = (1 << 25) - 39  # that weights repeat


class _Writer:
    """A graph being written, its large tensors straight into the data file."""

    def __init__(self, file: BinaryIO, location: str) -> None:
        self.nodes: list[NodeProto] = []
        self.tensors: list[TensorProto] = []
        self._file = file
        self._location = location
        self._random = np.random.default_rng(0).integers(0, 256, RANDOM_BYTES, np.uint8)
        self._next = 0  # of the random bytes

    def node(self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        """Append a node; returns its first output."""
        self.nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def external(self, name: str, kind: int, shape: tuple[int, ...], pieces: Iterator[NDArray[Any]]) -> str:
        """Append a tensor, its data piece by piece."""
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        begin = self._file.tell()
        for piece in pieces:
            self._file.write(np.ascontiguousarray(piece).data)
        self.again(name, kind, shape, begin, self._file.tell() - begin)
        return name

    def again(self, name: str, kind: int, shape: tuple[int, ...], begin: int, length: int) -> None:
        """Append a tensor whose data is in the file already."""
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in {"location": self._location, "offset": begin, "length": length}.items():
            tensor.external_data.add(key=key, value=str(value))
        self.tensors.append(tensor)

    def small(self, name: str, array: NDArray[Any]) -> str:
        """Append a tensor that stays in the graph."""
        self.tensors.append(helper.make_tensor(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape, array))
        return name

    def random(self, count: int) -> Iterator[NDArray[np.uint8]]:
        """``count`` random bytes, going on where the tensor before ended: equal tensors would be kept once."""
        while count > 0:
            piece = self._random[self._next : self._next + count]
            yield piece
            count -= len(piece)
            self._next = (self._next + len(piece)) % RANDOM_BYTES

    def linear(self, x: str, name: str, rows: int, columns: int, bits: int) -> str:
        """A quantized product with random weights, (..., columns) -> (..., rows)."""
        blocks = columns // BLOCK
        data = self.random(rows * columns * bits // 8)
        weight = self.external(f"{name}.weight", TensorProto.UINT8, (rows, blocks, BLOCK * bits // 8), data)
        scale = _scales(rows * blocks, columns, bits)
        scales = self.external(f"{name}.scales", TensorProto.FLOAT, (rows, blocks), scale)
        attributes = {"K": columns, "N": rows, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
        return self.node("MatMulNBits", [x, weight, scales], [f"{name}.out"], "com.microsoft", **attributes)

    def norm(self, stream: str, added: str, name: str, width: int, eps: float) -> tuple[str, str]:
        """The norm of a sum, and the sum."""
        weight = self.small(f"{name}.weight", np.ones(width, np.float32))
        outputs = [f"{name}.out", "", "", f"{name}.sum"]
        self.node("SkipSimplifiedLayerNormalization", [stream, added, weight], outputs, "com.microsoft", epsilon=eps)
        return outputs[0], outputs[3]


def write_model(shape: LlamaShape, bits: int, folder: Path) -> None:
    """Write ``model.onnx``, its data and ``genai_config.json``.

    Args:
        shape: of the model.
        bits: of the layers' matrices.
        folder: to make.

    Raises:
        UnavailableError: rows of a matrix are not made of whole blocks.
    """
    if any(columns % BLOCK for _, columns in shape.layer_matrices.values()):
        raise UnavailableError(f"needs widths that are multiples of {BLOCK}")
    folder.mkdir(parents=True)
    with (folder / "model.onnx.data").open("wb") as file:
        model = _model(shape, bits, _Writer(file, "model.onnx.data"))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "genai_config.json").write_text(json.dumps(_config(shape), indent=2) + "\n", encoding="utf-8")


def _model(shape: LlamaShape, bits: int, writer: _Writer) -> ModelProto:
    lengths, total = _lengths(writer)
    cos, sin = _rotations(writer, shape.dim_head)
    stream = _embedding(writer, shape)
    weight = writer.small("norm.0.weight", np.ones(shape.hidden, np.float32))
    x = writer.node("SimplifiedLayerNormalization", [stream, weight], ["norm.0.out"], axis=-1, epsilon=shape.eps)
    for i in range(shape.layers):
        qkv = writer.linear(x, f"{i}.qkv", 3 * shape.attention, shape.hidden, bits)
        past = [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        mixed = writer.node(
            "GroupQueryAttention",
            [qkv, "", "", *past, lengths, total, cos, sin],
            [f"{i}.mixed", f"present.{i}.key", f"present.{i}.value"],
            "com.microsoft",
            num_heads=shape.heads,
            kv_num_heads=shape.heads,
            scale=1 / math.sqrt(shape.dim_head),
            do_rotary=1,
        )
        attended = writer.linear(mixed, f"{i}.o", shape.hidden, shape.attention, bits)
        x, stream = writer.norm(stream, attended, f"{i}.ffn_norm", shape.hidden, shape.eps)
        gate = writer.linear(x, f"{i}.gate", shape.ff, shape.hidden, bits)
        up = writer.linear(x, f"{i}.up", shape.ff, shape.hidden, bits)
        sigmoid = writer.node("Sigmoid", [gate], [f"{i}.sigmoid"])
        silu = writer.node("Mul", [gate, sigmoid], [f"{i}.silu"])
        gated = writer.node("Mul", [silu, up], [f"{i}.gated"])
        down = writer.linear(gated, f"{i}.down", shape.hidden, shape.ff, bits)
        x, stream = writer.norm(stream, down, f"{i}.next_norm", shape.hidden, shape.eps)
    _head(writer, x, shape)
    return _proto(shape, writer)


def _lengths(writer: _Writer) -> tuple[str, str]:
    """Keys of each sequence less one, and the longest sequence, as GroupQueryAttention wants them."""
    one, axis = writer.small("one", np.array([1], np.int64)), writer.small("axis", np.array([1], np.int64))
    count = writer.node("ReduceSum", ["attention_mask", axis], ["mask_sum"])
    less = writer.node("Sub", [count, one], ["mask_less"])
    lengths = writer.node("Cast", [less], ["lengths"], to=TensorProto.INT32)
    size = writer.node("Shape", ["attention_mask"], ["mask_shape"])
    width = writer.node("Gather", [size, writer.small("second", np.array(1, np.int64))], ["mask_width"], axis=0)
    return lengths, writer.node("Cast", [width], ["total"], to=TensorProto.INT32)


def _rotations(writer: _Writer, dim_head: int) -> tuple[str, str]:
    phases = np.outer(np.arange(CONTEXT), 1 / 10000 ** (np.arange(0, dim_head, 2) / dim_head))
    return (
        writer.small("cos", np.cos(phases).astype(np.float32)),
        writer.small("sin", np.sin(phases).astype(np.float32)),
    )


def _embedding(writer: _Writer, shape: LlamaShape) -> str:
    """Rows of the table that is the head as well, (B, S, hidden)."""
    rows, columns = shape.vocab, shape.hidden
    data = writer.external("table", TensorProto.UINT8, (rows, columns), writer.random(rows * columns))
    scales = writer.external(
        "table.scales", TensorProto.FLOAT, (rows, columns // BLOCK), _scales(rows * columns // BLOCK, 1, HEAD_BITS)
    )
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": HEAD_BITS}
    return writer.node("GatherBlockQuantized", [data, "input_ids", scales], ["embedded"], "com.microsoft", **attributes)


def _head(writer: _Writer, x: str, shape: LlamaShape) -> None:
    """Logits of the last token only, (B, 1, vocab)."""
    table = next(tensor for tensor in writer.tensors if tensor.name == "table")
    place = {entry.key: entry.value for entry in table.external_data}
    blocks = shape.hidden // BLOCK
    weight = (shape.vocab, blocks, BLOCK)
    writer.again("head.weight", TensorProto.UINT8, weight, int(place["offset"]), int(place["length"]))
    scales = writer.external(
        "head.scales",
        TensorProto.FLOAT,
        (shape.vocab, blocks),
        _scales(shape.vocab * blocks, shape.hidden, HEAD_BITS),
    )
    last = writer.node("Gather", [x, writer.small("last", np.array([-1], np.int64))], ["last_token"], axis=1)
    attributes = {"K": shape.hidden, "N": shape.vocab, "bits": HEAD_BITS, "block_size": BLOCK, "accuracy_level": 4}
    writer.node("MatMulNBits", [last, "head.weight", scales], ["logits"], "com.microsoft", **attributes)


def _scales(count: int, columns: int, bits: int) -> Iterator[NDArray[np.float32]]:
    """One scale for each block, so that outputs are about as large as inputs."""
    yield np.full(count, 1 / (DEVIATION[bits] * math.sqrt(columns)), np.float32)


def _proto(shape: LlamaShape, writer: _Writer) -> ModelProto:
    ids, numbers = TensorProto.INT64, TensorProto.FLOAT
    inputs = [
        helper.make_tensor_value_info("input_ids", ids, ["B", "S"]),
        helper.make_tensor_value_info("attention_mask", ids, ["B", "T"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", numbers, ["B", 1, shape.vocab])]
    for i in range(shape.layers):
        for kind in ("key", "value"):
            before: list[str | int | None] = ["B", shape.heads, "P", shape.dim_head]
            after: list[str | int | None] = ["B", shape.heads, "T", shape.dim_head]
            inputs.append(helper.make_tensor_value_info(f"past_key_values.{i}.{kind}", numbers, before))
            outputs.append(helper.make_tensor_value_info(f"present.{i}.{kind}", numbers, after))
    graph = helper.make_graph(writer.nodes, "llama", inputs, outputs, writer.tensors)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", MICROSOFT_OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _config(shape: LlamaShape) -> dict[str, Any]:
    decoder = {
        "session_options": {"provider_options": []},
        "filename": "model.onnx",
        "head_size": shape.dim_head,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "context_length": CONTEXT,
        "vocab_size": shape.vocab,
        "decoder": decoder,
    }
    return {"model": model, "search": {"max_length": CONTEXT, "past_present_share_buffer": True}}
