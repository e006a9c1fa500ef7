"""Nodes, tensors and functions as one ONNX model: inputs and outputs are the contract with the engine.

Shapes: B sequences, Q new tokens, K keys, R positions that get logits, E extension tokens, P cache rows.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from cpmbee.cache_types import CacheType, cache_names
from cpmbee.config import ModelConfig
from cpmbee.export.builder import CONTRIB, GraphBuilder
from cpmbee.export.exact_linear import exact_linear
from cpmbee.export.functions import DOMAIN, DOMAIN_VERSION, bucketed_attention, bucketed_position_bias
from cpmbee.export.quantized_embedding import quantized_embedding
from cpmbee.export.quantized_functions import quantized_linear
from cpmbee.export.row_functions import add_rms_norm, gated_gelu, rms_norm, subscript_rotation

IR_VERSION = 9  # the oldest supported runtime, 1.18, reads it
OPSET = 18
FLOAT = TensorProto.FLOAT
NUMBERS: dict[CacheType, int] = {"fp32": FLOAT, "fp16": TensorProto.FLOAT16, "int8": TensorProto.INT8}  # of the cache


def to_model(
    graph: GraphBuilder, config: ModelConfig, initializers: list[onnx.TensorProto], cache: CacheType
) -> onnx.ModelProto:
    """Wrap the nodes with inputs, outputs, functions and ``initializers`` into a model."""
    scales: list[str | int] = ["P", config.num_attention_heads]
    caches = {
        name: (FLOAT, scales) if "scales" in name else (NUMBERS[cache], [*scales, config.dim_head])
        for name in cache_names(config, cache)
    }
    inputs = [
        _value("input_ids", TensorProto.INT32, ["B", "Q"]),
        _value("input_subs", TensorProto.INT32, ["B", "Q"]),
        _value("relation", TensorProto.INT16, ["B", "Q", "K"]),
        _value("slots", TensorProto.INT32, ["B", "K"]),
        _value("new_slots", TensorProto.INT32, ["B", "Q"]),
        _value("logits_index", TensorProto.INT32, ["B", "R"]),
        _value("ext_ids", TensorProto.INT32, ["E"]),
        _value("ext_subs", TensorProto.INT32, ["E"]),
        *(_value(name, *described) for name, described in caches.items()),
    ]
    outputs = [
        _value("logits", FLOAT, ["B", "R", "V_plus_E"]),
        *(_value(f"present_{name}", *described) for name, described in caches.items()),
    ]
    constants = [*graph.constants.values(), *initializers]
    opsets = [helper.make_opsetid(*pair) for pair in (("", OPSET), (CONTRIB, 1), (DOMAIN, DOMAIN_VERSION))]
    functions = [bucketed_position_bias(), bucketed_attention(cache)]
    functions += [subscript_rotation(config.half), rms_norm(), add_rms_norm(), gated_gelu()]
    if graph.quantized:
        functions += [quantized_linear(), quantized_embedding(graph.quantized[0].layout.bits)]
    exact = [matrix for matrix in graph.quantized if matrix.exact_activations]
    if exact:
        functions.append(exact_linear(exact[0].layout.bits))
    model: onnx.ModelProto = helper.make_model(
        helper.make_graph(graph.nodes, "cpmbee", inputs, outputs, initializer=constants),
        opset_imports=opsets,
        functions=functions,
        producer_name="cpmbee",
        ir_version=IR_VERSION,
    )
    return model


def _value(name: str, dtype: int, shape: list[str | int]) -> onnx.ValueInfoProto:
    info: onnx.ValueInfoProto = helper.make_tensor_value_info(name, dtype, shape)
    return info
