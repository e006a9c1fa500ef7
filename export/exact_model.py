"""A quantized model whose products are exact: the same file, the same graph, but no activation is rounded.

Rounding activations moves logits by about one hundredth of their range, enough to hide a slightly wrong graph. With
``QuantizedLinear`` exchanged for an fp32 product with the dequantized weights, what is left has to agree with the
reference as closely as an fp32 export does.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from cpmbee.config import ModelConfig
from cpmbee.export.dequantized import external_tensors
from cpmbee.export.functions import DOMAIN, DOMAIN_VERSION, FUNCTION_OPSET, int64s
from cpmbee.export.onnx_model import OnnxModel
from cpmbee.export.quantized_embedding import attribute_vector, nibbles
from cpmbee.export.quantized_functions import QUANTIZED_LINEAR


def exact_model(model_file: Path, config: ModelConfig, cache_rows: int) -> OnnxModel:
    """A session on a quantized folder's model with exact products; the file itself is not touched."""
    model = onnx.load(model_file, load_external_data=False)
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type == QUANTIZED_LINEAR:
            (bits,) = (attribute.i for attribute in node.attribute if attribute.name == "bits")
            node.op_type = _name(bits)
    model.functions.extend(_exact_linear(bits) for bits in (4, 8))
    return OnnxModel(
        model.SerializeToString(),
        config,
        cache_rows,
        use_native=False,
        level=ort.GraphOptimizationLevel.ORT_DISABLE_ALL,  # or every matrix would be dequantized for good
        initializers=external_tensors(model_file),
    )


def _name(bits: int) -> str:
    return f"ExactLinear{bits}"


def _exact_linear(bits: int) -> onnx.FunctionProto:
    """``QuantizedLinear`` without rounding of ``x``, for weights of 4 or 8 bits."""
    nodes = [
        int64s("last", [-1]),
        int64s("zero", [0]),
        int64s("axes", [0, 1]),
        int64s("origin", [0, 0]),
        helper.make_node("Transpose", ["weight"], ["bytes"], perm=[0, 2, 1, 3]),
        *(nibbles() if bits == 4 else [helper.make_node("Identity", ["bytes"], ["numbers"])]),
        helper.make_node("Cast", ["numbers"], ["unsigned"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["zero_point"], value_float=float(1 << (bits - 1))),
        helper.make_node("Sub", ["unsigned", "zero_point"], ["signed"]),
        *attribute_vector("block_size"),
        helper.make_node("Concat", ["last", "block_size"], ["blocks_shape"], axis=0),
        helper.make_node("Reshape", ["signed", "blocks_shape"], ["blocks"]),  # (outputs * blocks, block)
        helper.make_node("Cast", ["scales"], ["scales_float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["scales_float"], ["scales_by_output"], perm=[0, 2, 1]),
        int64s("column", [-1, 1]),
        helper.make_node("Reshape", ["scales_by_output", "column"], ["block_scales"]),
        helper.make_node("Mul", ["blocks", "block_scales"], ["values"]),
        helper.make_node("Shape", ["scales"], ["num_blocks"], start=1, end=2),
        helper.make_node("Mul", ["num_blocks", "block_size"], ["padded_width"]),
        helper.make_node("Concat", ["last", "padded_width"], ["padded_shape"], axis=0),
        helper.make_node("Reshape", ["values", "padded_shape"], ["padded"]),
        *attribute_vector("out_features"),
        *attribute_vector("in_features"),
        helper.make_node("Concat", ["out_features", "in_features"], ["end"], axis=0),
        helper.make_node("Slice", ["padded", "origin", "end", "axes"], ["matrix"]),
        helper.make_node("Transpose", ["matrix"], ["columns"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "columns"], ["y"]),
    ]
    opsets = [helper.make_opsetid("", FUNCTION_OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    attributes = ["bits", "block_size", "in_features", "out_features"]
    return helper.make_function(
        DOMAIN, _name(bits), ["x", "weight", "scales"], ["y"], nodes, opsets, attributes=attributes
    )
