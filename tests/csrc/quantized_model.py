"""One ``QuantizedLinear`` as a whole ONNX model, with random weights packed for it, and what NumPy says comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from cpmbee.export import functions, quantized_functions

LANES = 16


@dataclass(frozen=True)
class Layer:
    """A quantized weight matrix, as numbers and as stored."""

    bits: int
    block_size: int
    in_features: int
    out_features: int
    matrix: npt.NDArray[np.float64]  # (out_features, in_features): what the stored numbers stand for
    weight: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]

    @property
    def attributes(self) -> dict[str, int]:
        """Of the node."""
        return {
            "bits": self.bits,
            "block_size": self.block_size,
            "in_features": self.in_features,
            "out_features": self.out_features,
        }


def random_layer(rng: np.random.Generator, bits: int, block_size: int, in_features: int, out_features: int) -> Layer:
    """All numbers that the bits allow, scales from 1/1000 to 1/100."""
    rows, columns = -(-out_features // LANES) * LANES, -(-in_features // block_size) * block_size
    zero_point = 1 << (bits - 1)
    numbers = rng.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    numbers[out_features:] = numbers[:, in_features:] = zero_point
    scales = rng.uniform(1e-3, 1e-2, (rows, columns // block_size)).astype(np.float16)
    values = (numbers.astype(np.float64) - zero_point) * np.repeat(scales.astype(np.float64), block_size, axis=1)
    lanes = numbers.reshape(rows // LANES, LANES, -1, 4 if bits == 8 else 8)
    if bits == 4:
        lanes = np.bitwise_or(lanes[..., 0::2], np.left_shift(lanes[..., 1::2], 4))
    return Layer(
        bits,
        block_size,
        in_features,
        out_features,
        matrix=values[:out_features, :in_features],
        weight=np.ascontiguousarray(lanes.transpose(0, 2, 1, 3)),
        scales=np.ascontiguousarray(scales.reshape(rows // LANES, LANES, -1).transpose(0, 2, 1)),
    )


def linear_model(layer: Layer, rank: int = 2, *, constants: bool = True, **attributes: int) -> bytes:
    """The layer as a checked, serialized model from ``x`` to ``y``; ``attributes`` replace those of the node.

    Without ``constants`` weight and scales are inputs of the model, of any shape.
    """
    node = helper.make_node(
        quantized_functions.QUANTIZED_LINEAR,
        ["x", "weight", "scales"],
        ["y"],
        domain=functions.DOMAIN,
        **{**layer.attributes, **attributes},
    )
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * rank)]
    initializers = []
    if constants:
        initializers = [
            numpy_helper.from_array(layer.weight, "weight"),
            numpy_helper.from_array(layer.scales, "scales"),
        ]
    else:
        inputs.append(helper.make_tensor_value_info("weight", TensorProto.UINT8, [None] * layer.weight.ndim))
        inputs.append(helper.make_tensor_value_info("scales", TensorProto.FLOAT16, [None] * layer.scales.ndim))
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)
    graph = helper.make_graph([node], "one_op", inputs, [output], initializers)
    opsets = [
        helper.make_opsetid("", functions.FUNCTION_OPSET),
        helper.make_opsetid(functions.DOMAIN, functions.DOMAIN_VERSION),
        helper.make_opsetid(quantized_functions.CONTRIB, 1),
    ]
    body = quantized_functions.quantized_linear()
    model = helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=9)
    onnx.checker.check_model(model)
    serialized: bytes = model.SerializeToString()
    return serialized


def exact(layer: Layer, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The product without rounding."""
    return np.asarray(x.astype(np.float64) @ layer.matrix.T)


def rounding_bound(layer: Layer, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """How far from :func:`exact` a right result may be, for each output.

    Rounding moves an activation by at most half of its block's scale, which is the largest magnitude of the block
    divided by 127; 1 % more for a runtime that scales by another power or rounds ties away; sums are in float32.
    """
    padding = -layer.in_features % layer.block_size
    blocks = (*x.shape[:-1], -1, layer.block_size)
    magnitude = np.abs(np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)]).astype(np.float64)).reshape(blocks)
    steps = np.repeat(magnitude.max(axis=-1) / 127, layer.block_size, axis=-1)[..., : layer.in_features]
    weights = np.abs(layer.matrix).T
    return np.asarray(1.01 * steps / 2 @ weights + 1e-5 * (np.abs(x) @ weights))


def quantized_product(layer: Layer, x: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """The product as the op defines it: activations rounded in float32, everything else without rounding."""
    padding = -layer.in_features % layer.block_size
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
    blocks = padded.reshape(*x.shape[:-1], -1, layer.block_size)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    steps = (largest / np.float32(127)).astype(np.float64)
    rounded = (np.rint(blocks * inverse) * steps).reshape(padded.shape)[..., : layer.in_features]
    return np.asarray(rounded @ layer.matrix.T)
