"""Mistakes that an exporter, its file or a kernel could make, one at a time, in an exported folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
from numpy.typing import NDArray

from cpmbee.export.dequantized import external_tensors
from cpmbee.export.functions import ATTENTION
from cpmbee.export.onnx_model import OnnxModel
from cpmbee.export.probes import GraphInputs
from cpmbee.export.quantized_functions import QUANTIZED_LINEAR
from cpmbee.folder import MANIFEST

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Mistake = Callable[[Path], AbstractContextManager[object]]  # alters a folder; holds while the context is open

QKV, OUT = "layers.0.attention/qkv_weight", "layers.1.ffn/out_weight"


def all_mistakes(bits: int) -> dict[str, Mistake]:
    """By what is wrong.

    Args:
        bits: of the folder's matrices.
    """
    half = 1 << (bits - 1)
    low = 0x0F if bits == 4 else 0xFF
    return {
        "rows of one block permuted": lambda folder: _file(folder, OUT, _swap_lanes),
        "inputs of one block permuted": lambda folder: _file(folder, OUT, _swap_inputs),
        "one group of outputs exchanged with the next": lambda folder: _file(folder, OUT, _swap_groups),
        "scale of one block doubled": lambda folder: _file(folder, f"{OUT}/scales", _scale(2.0)),
        "scale of one block negated": lambda folder: _file(folder, f"{OUT}/scales", _scale(-1.0)),
        "scale of one block of another row": lambda folder: _file(folder, f"{OUT}/scales", _scale_of_next),
        "zero point forgotten in one matrix": lambda folder: _file(
            folder, OUT, lambda a: a.__ixor__(_both(half, bits))
        ),
        "numbers of one matrix inverted": lambda folder: _file(folder, OUT, lambda a: a.__ixor__(_both(low, bits))),
        "q and k exchanged": lambda folder: _file(folder, QKV, _swap_thirds, scales=True),
        "one row of the head zero": lambda folder: _file(folder, "embedding/scales", _zero_row),
        "norm of one layer without its weight": lambda folder: _file(folder, "layers.1.ffn/norm_weight", _flat),
        "bias table shifted by one row": lambda folder: _file(folder, "position_bias", _roll),
        "one layer's feed-forward skipped": lambda folder: _graph(folder, _skip_block),
        "eps of one norm a thousandth": lambda folder: _graph(folder, _attribute("AddRMSNorm", "epsilon", 1e-3)),
        "attention scores a tenth too large": lambda folder: _graph(folder, _attribute(ATTENTION, "scale", factor=1.1)),
        "subscripts turn at another speed": lambda folder: _graph(
            folder, _attribute("SubscriptRotation", "distance_scale", factor=0.9)
        ),
        "gate and value exchanged": lambda folder: _graph(folder, _swap_gate),
        "body of the product a fifth too large": lambda folder: _graph(folder, _larger_product),
        "body of the product rounds to half as many steps": lambda folder: _graph(folder, _coarse_product),
        "native logits a fifth of their range off": lambda folder: _kernel(lambda x: x + np.float32(0.2) * np.ptp(x)),
        "native logits off by noise of a fifth of their range": lambda folder: _kernel(_noise),
        "native kernel wrong for the last output": lambda folder: _kernel(_last_output),
        "native kernel wrong at the last position": lambda folder: _kernel(_last_position),
        "native kernel wrong in one tile of 16 outputs": lambda folder: _kernel(_tile),
        "native kernel returns NaN once": lambda folder: _kernel(_nan),
    }


def _file(
    folder: Path, name: str, change: Callable[[Array], object], *, scales: bool = False
) -> AbstractContextManager[None]:
    """Change a tensor of the data file in place."""
    tensors = external_tensors(folder / "model.onnx")
    for tensor in [tensors[name], *([tensors[f"{name}/scales"]] if scales else [])]:
        place = np.memmap(folder / "model.onnx.data", tensor.dtype, "r+", tensor.offset, tensor.shape)  # type: ignore[attr-defined, call-overload]
        change(place)
        place.flush()
    _rehash(folder, "model.onnx.data")
    return nullcontext()


def _graph(folder: Path, change: Callable[[onnx.ModelProto], object]) -> AbstractContextManager[None]:
    """Change the graph."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    _rehash(folder, "model.onnx")
    return nullcontext()


def _kernel(change: Callable[[Float32], Float32]) -> AbstractContextManager[object]:
    """Change what the native kernels compute, of one call."""
    run = OnnxModel.run_all

    def wrong(self: OnnxModel, inputs: Sequence[GraphInputs]) -> Iterator[Float32]:
        for number, logits in enumerate(run(self, inputs)):
            last = number == len(inputs) - 1
            yield change(logits.copy()) if last and self.use_native else logits

    return mock.patch.object(OnnxModel, "run_all", wrong)


def _rehash(folder: Path, name: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    content = (folder / name).read_bytes()
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _both(value: int, bits: int) -> np.uint8:
    """A number in both halves of a byte."""
    byte: np.uint8 = np.uint8(value | value << 4 if bits == 4 else value)
    return byte


def _swap_lanes(packed: Array) -> None:
    packed[0, :8, [0, 1]] = packed[0, :8, [1, 0]]


def _swap_inputs(packed: Array) -> None:
    packed[0, [0, 1], 0] = packed[0, [1, 0], 0]


def _swap_groups(packed: Array) -> None:
    packed[[0, 1]] = packed[[1, 0]]


def _swap_thirds(packed: Array) -> None:
    third = len(packed) // 3
    packed[: 2 * third] = np.concatenate([packed[third : 2 * third], packed[:third]])


def _scale(factor: float) -> Callable[[Array], None]:
    def change(scales: Array) -> None:
        scales[0, 0, 3] *= factor

    return change


def _scale_of_next(scales: Array) -> None:
    """Of the row whose scale differs most."""
    lanes = np.abs(scales[0, 0].astype(np.float32))
    scales[0, 0, lanes.argmin()] = scales[0, 0, lanes.argmax()]


def _zero_row(scales: Array) -> None:
    scales[1, :, 5] = 0


def _flat(weight: Array) -> None:
    weight[:] = weight.mean()


def _roll(table: Array) -> None:
    table[:] = np.roll(table, 1, 0)


def _skip_block(model: onnx.ModelProto) -> None:
    """The block's output is zero times itself."""
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == "layers.1.ffn/out":
                node.input[i] = "layers.1.ffn/nothing"
    place = next(i for i, node in enumerate(model.graph.node) if "layers.1.ffn/out" in node.output)
    names = ["layers.1.ffn/out", "layers.1.ffn/out"]
    model.graph.node.insert(place + 1, onnx.helper.make_node("Sub", names, ["layers.1.ffn/nothing"]))


def _attribute(op: str, name: str, value: float = 0.0, factor: float = 0.0) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == op)
        for attribute in node.attribute:
            if attribute.name == name:
                attribute.f = attribute.f * factor if factor else value

    return change


def _function(model: onnx.ModelProto, name: str) -> onnx.FunctionProto:
    found: onnx.FunctionProto = next(function for function in model.functions if function.name == name)
    return found


def _swap_gate(model: onnx.ModelProto) -> None:
    split = _function(model, "GatedGelu").node[0]
    split.output[0], split.output[1] = split.output[1], split.output[0]


def _larger_product(model: onnx.ModelProto) -> None:
    function = _function(model, QUANTIZED_LINEAR)
    function.node[-1].CopyFrom(onnx.helper.make_node("Mul", ["product", "larger"], ["y"]))
    function.node.insert(0, onnx.helper.make_node("Constant", [], ["larger"], value_float=1.2))


def _coarse_product(model: onnx.ModelProto) -> None:
    """As if every activation lost its last bit, in rows as wholes."""
    function = _function(model, QUANTIZED_LINEAR)
    product = next(node for node in function.node if node.op_type == "MatMulNBits")
    product.input[0] = "coarse"
    constants = [("steps", 63.0), ("tiny", 1e-30)]
    nodes = [onnx.helper.make_node("Constant", [], [name], value_float=number) for name, number in constants]
    axis = onnx.helper.make_tensor("row", onnx.TensorProto.INT64, [1], [-1])
    nodes += [
        onnx.helper.make_node("Constant", [], ["row"], value=axis),
        onnx.helper.make_node("Abs", ["x"], ["magnitudes"]),
        onnx.helper.make_node("ReduceMax", ["magnitudes", "row"], ["magnitude"], keepdims=1),
        onnx.helper.make_node("Max", ["magnitude", "tiny"], ["reach"]),
        onnx.helper.make_node("Div", ["reach", "steps"], ["step"]),
        onnx.helper.make_node("Div", ["x", "step"], ["units"]),
        onnx.helper.make_node("Round", ["units"], ["rounded"]),
        onnx.helper.make_node("Mul", ["rounded", "step"], ["coarse"]),
    ]
    others = list(function.node)
    del function.node[:]
    function.node.extend([*nodes, *others])


def _noise(logits: Float32) -> Float32:
    reach = np.float32(0.2) * np.ptp(logits)
    noise = np.random.default_rng(0).uniform(-1, 1, logits.shape).astype(np.float32)
    noisy: Float32 = logits + reach * noise
    return noisy


def _last_output(logits: Float32) -> Float32:
    logits[..., -8] += np.float32(0.2) * np.ptp(logits)
    return logits


def _last_position(logits: Float32) -> Float32:
    logits[-1, -1] = logits[-1, 0]
    return logits


def _tile(logits: Float32) -> Float32:
    logits[-1, -1, 16:32] += np.float32(0.2) * np.ptp(logits)
    return logits


def _nan(logits: Float32) -> Float32:
    logits[0, 0, 0] = np.nan
    return logits
