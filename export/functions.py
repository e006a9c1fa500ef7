"""The custom ops as model-local ONNX functions: standard operators only, so that the file runs anywhere.

A runtime that has the native kernels registered uses those; any other runtime inlines these bodies. Both compute the
same thing, and the names, inputs, outputs and attributes here are the schema that the kernels in ``csrc/`` declare.
"""

from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper

from cpmbee.cache_types import CacheType, layer_tensors
from cpmbee.folder import OPS_VERSION

DOMAIN = "cpm_bee"
DOMAIN_VERSION = OPS_VERSION
POSITION_BIAS = "BucketedPositionBias"
ATTENTION = "BucketedAttention"

FUNCTION_OPSET = 18  # ONNX Runtime 1.18 knows it, and Split has num_outputs from here on


def bucketed_position_bias() -> onnx.FunctionProto:
    """The body of ``BucketedPositionBias(relation, table) -> bias``.

    ``relation`` int16 (batch, queries, keys) names a row of ``table`` float32 (buckets, heads), or is -1 where the
    query may not look at the key; ``bias`` float32 (batch, heads, queries, keys) is -inf there.
    """
    nodes = [
        # One more row of -inf at the end: index -1 is "the last row", so masking costs nothing.
        int64s("pads", [0, 0, 1, 0]),
        helper.make_node("Constant", [], ["minus_infinity"], value_float=float("-inf")),
        helper.make_node("Pad", ["table", "pads", "minus_infinity"], ["padded_table"]),
        helper.make_node("Transpose", ["padded_table"], ["bias_by_head"], perm=[1, 0]),
        helper.make_node("Cast", ["relation"], ["rows"], to=TensorProto.INT32),
        # Heads outermost, so that the big transposition below moves whole (queries, keys) planes.
        helper.make_node("Gather", ["bias_by_head", "rows"], ["heads_first"], axis=1),
        helper.make_node("Transpose", ["heads_first"], ["bias"], perm=[1, 0, 2, 3]),
    ]
    return _function(POSITION_BIAS, ["relation", "table"], ["bias"], nodes)


def bucketed_attention(cache: CacheType = "fp32") -> onnx.FunctionProto:
    """The body of ``BucketedAttention``: append keys and values to the pool, then attend over the listed rows.

    Inputs: ``qkv`` float32 (batch, queries, 3 * heads * dim_head), all heads of q, then k, then v; ``relation`` and
    ``table`` as in ``BucketedPositionBias``; ``slots`` int32 (batch, keys), the pool rows of the keys; ``new_slots``
    int32 (batch, queries), the pool rows to write; ``key_cache`` and ``value_cache`` (rows, heads, dim_head) of the
    type that ``cache`` names; with int8 ``key_scales`` and ``value_scales`` float32 (rows, heads), what the numbers of
    a row and head are multiplied with.
    Attributes: ``num_heads`` and ``scale``, which multiplies q . k before the bias is added. Outputs: ``context``
    float32 (batch, queries, heads * dim_head), zero for a query that sees no key, and the caches with the new rows in
    them. New rows are rounded to the cache's type first, and attention reads them like all others.
    """
    nodes = [
        helper.make_node("Split", ["qkv"], ["query", "key", "value"], axis=-1, num_outputs=3),
        helper.make_node("Shape", ["key_cache"], ["row_shape"], start=1),  # (heads, dim_head)
        # Append: one scatter of whole rows into each pool.
        int64s("any", [-1]),
        helper.make_node("Concat", ["any", "row_shape"], ["new_rows_shape"], axis=0),
        helper.make_node("Reshape", ["key", "new_rows_shape"], ["new_keys"]),
        helper.make_node("Reshape", ["value", "new_rows_shape"], ["new_values"]),
        int64s("column", [-1, 1]),
        helper.make_node("Cast", ["new_slots"], ["new_slots_int64"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["new_slots_int64", "column"], ["new_indices"]),
        *_rounding(cache),
        *_append("key", cache),
        *_append("value", cache),
        # Scores: (batch, heads, queries, keys).
        int64s("same_same", [0, 0]),
        helper.make_node("Concat", ["same_same", "row_shape"], ["query_shape"], axis=0),
        _float_attribute("scale_factor", "scale"),
        helper.make_node("Mul", ["query", "scale_factor"], ["scaled_query"]),
        helper.make_node("Reshape", ["scaled_query", "query_shape"], ["query_rows"]),
        helper.make_node("Transpose", ["query_rows"], ["query_heads"], perm=[0, 2, 1, 3]),
        *_read("key", cache),
        helper.make_node("Transpose", ["key_rows"], ["key_heads"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["query_heads", "key_heads"], ["products"]),
        helper.make_node(POSITION_BIAS, ["relation", "table"], ["bias"], domain=DOMAIN),
        helper.make_node("Add", ["products", "bias"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
        # Context: (batch, queries, heads * dim_head).
        *_read("value", cache),
        helper.make_node("Transpose", ["value_rows"], ["value_heads"], perm=[0, 2, 1, 3]),
        helper.make_node("MatMul", ["weights", "value_heads"], ["context_heads"]),
        helper.make_node("Transpose", ["context_heads"], ["context_rows"], perm=[0, 2, 1, 3]),
        int64s("merge_heads", [0, 0, -1]),
        helper.make_node("Reshape", ["context_rows", "merge_heads"], ["seeing_context"]),
        # Softmax over nothing but -inf is NaN: such a query gets zeros instead.
        helper.make_node("Cast", ["relation"], ["relation_int32"], to=TensorProto.INT32),
        helper.make_node("ReduceMax", ["relation_int32", "any"], ["best_relation"], keepdims=1),
        helper.make_node("Constant", [], ["zero_int32"], value=helper.make_tensor("", TensorProto.INT32, [], [0])),
        helper.make_node("GreaterOrEqual", ["best_relation", "zero_int32"], ["sees_something"]),
        helper.make_node("Constant", [], ["zero"], value_float=0.0),
        helper.make_node("Where", ["sees_something", "seeing_context", "zero"], ["context"]),
    ]
    caches = layer_tensors(cache)
    return _function(
        ATTENTION,
        ["qkv", "relation", "table", "slots", "new_slots", *caches],
        ["context", *(f"present_{name}" for name in caches)],
        nodes,
        ["num_heads", "scale"],
    )


def _rounding(cache: CacheType) -> list[onnx.NodeProto]:
    """Constants that `_append` needs."""
    if cache == "fp32":
        return []
    largest = 65504.0 if cache == "fp16" else 127.0
    nodes = [
        helper.make_node("Constant", [], ["largest"], value_float=largest),
        helper.make_node("Constant", [], ["smallest"], value_float=-largest),
    ]
    if cache == "int8":
        nodes += [int64s("last", [-1]), helper.make_node("Constant", [], ["tiny"], value_float=1e-30)]
    return nodes


def _append(kind: str, cache: CacheType) -> list[onnx.NodeProto]:
    """Round ``new_keys`` or ``new_values`` and write them to their pool.

    Half precision saturates; an int8 row and head has the scale at which its largest magnitude becomes 127.
    """
    new, stored = f"new_{kind}s", f"new_{kind}_numbers"
    scatter = [helper.make_node("ScatterND", [f"{kind}_cache", "new_indices", stored], [f"present_{kind}_cache"])]
    if cache == "fp32":
        scatter[0].input[2] = new
        return scatter
    if cache == "fp16":
        return [
            helper.make_node("Clip", [new, "smallest", "largest"], [f"{new}_inside"]),
            helper.make_node("Cast", [f"{new}_inside"], [stored], to=TensorProto.FLOAT16),
            *scatter,
        ]
    scales = f"new_{kind}_scales"
    return [
        helper.make_node("Abs", [new], [f"{new}_magnitudes"]),
        helper.make_node("ReduceMax", [f"{new}_magnitudes", "last"], [f"{new}_largest"], keepdims=1),
        helper.make_node("Max", [f"{new}_largest", "tiny"], [f"{new}_reach"]),
        helper.make_node("Div", [f"{new}_reach", "largest"], [f"{scales}_column"]),
        helper.make_node("Div", [new, f"{scales}_column"], [f"{new}_units"]),
        helper.make_node("Round", [f"{new}_units"], [f"{new}_rounded"]),
        helper.make_node("Cast", [f"{new}_rounded"], [stored], to=TensorProto.INT8),
        *scatter,
        helper.make_node("Squeeze", [f"{scales}_column", "last"], [scales]),
        helper.make_node("ScatterND", [f"{kind}_scales", "new_indices", scales], [f"present_{kind}_scales"]),
    ]


def _read(kind: str, cache: CacheType) -> list[onnx.NodeProto]:
    """``key_rows`` or ``value_rows``, float32 (batch, keys, heads, dim_head): what is in the listed rows of a pool."""
    rows, stored = f"{kind}_rows", f"{kind}_numbers"
    if cache == "fp32":
        return [helper.make_node("Gather", [f"present_{kind}_cache", "slots"], [rows], axis=0)]
    gather = helper.make_node("Gather", [f"present_{kind}_cache", "slots"], [stored], axis=0)
    if cache == "fp16":
        return [gather, helper.make_node("Cast", [stored], [rows], to=TensorProto.FLOAT)]
    return [
        gather,
        helper.make_node("Cast", [stored], [f"{kind}_units"], to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"present_{kind}_scales", "slots"], [f"{kind}_row_scales"], axis=0),
        helper.make_node("Unsqueeze", [f"{kind}_row_scales", "last"], [f"{kind}_scale_column"]),
        helper.make_node("Mul", [f"{kind}_units", f"{kind}_scale_column"], [rows]),
    ]


def _function(
    name: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    nodes: Sequence[onnx.NodeProto],
    attributes: Sequence[str] = (),
) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", FUNCTION_OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return helper.make_function(DOMAIN, name, inputs, outputs, nodes, opsets, attributes=attributes)


def int64s(name: str, values: Sequence[int]) -> onnx.NodeProto:
    """A constant int64 vector."""
    # A tensor, not value_ints: older runtimes' shape inference (1.18, 1.22) does not see through the latter.
    tensor = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
    return helper.make_node("Constant", [], [name], value=tensor)


def _float_attribute(output: str, attribute: str) -> onnx.NodeProto:
    """A constant whose value is the calling node's ``attribute``."""
    node = helper.make_node("Constant", [], [output])
    node.attribute.append(
        onnx.AttributeProto(name="value_float", type=onnx.AttributeProto.FLOAT, ref_attr_name=attribute)
    )
    return node
