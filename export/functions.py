"""The custom ops as model-local ONNX functions: standard operators only, so that the file runs anywhere.

A runtime that has the native kernels registered uses those; any other runtime inlines these bodies. Both compute the
same thing, and the names, inputs, outputs and attributes here are the schema that the kernels in ``csrc/`` declare.
"""

from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper

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


def bucketed_attention() -> onnx.FunctionProto:
    """The body of ``BucketedAttention``: append keys and values to the pool, then attend over the listed rows.

    Inputs: ``qkv`` float32 (batch, queries, 3 * heads * dim_head), all heads of q, then k, then v; ``relation`` and
    ``table`` as in ``BucketedPositionBias``; ``slots`` int32 (batch, keys), the pool rows of the keys; ``new_slots``
    int32 (batch, queries), the pool rows to write; ``key_cache`` and ``value_cache`` float32 (rows, heads, dim_head).
    Attributes: ``num_heads`` and ``scale``, which multiplies q . k before the bias is added. Outputs: ``context``
    float32 (batch, queries, heads * dim_head), zero for a query that sees no key, and the two caches with the new
    rows in them.
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
        helper.make_node("ScatterND", ["key_cache", "new_indices", "new_keys"], ["present_key_cache"]),
        helper.make_node("ScatterND", ["value_cache", "new_indices", "new_values"], ["present_value_cache"]),
        # Scores: (batch, heads, queries, keys).
        int64s("same_same", [0, 0]),
        helper.make_node("Concat", ["same_same", "row_shape"], ["query_shape"], axis=0),
        _float_attribute("scale_factor", "scale"),
        helper.make_node("Mul", ["query", "scale_factor"], ["scaled_query"]),
        helper.make_node("Reshape", ["scaled_query", "query_shape"], ["query_rows"]),
        helper.make_node("Transpose", ["query_rows"], ["query_heads"], perm=[0, 2, 1, 3]),
        helper.make_node("Gather", ["present_key_cache", "slots"], ["key_rows"], axis=0),
        helper.make_node("Transpose", ["key_rows"], ["key_heads"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["query_heads", "key_heads"], ["products"]),
        helper.make_node(POSITION_BIAS, ["relation", "table"], ["bias"], domain=DOMAIN),
        helper.make_node("Add", ["products", "bias"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
        # Context: (batch, queries, heads * dim_head).
        helper.make_node("Gather", ["present_value_cache", "slots"], ["value_rows"], axis=0),
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
    return _function(
        ATTENTION,
        ["qkv", "relation", "table", "slots", "new_slots", "key_cache", "value_cache"],
        ["context", "present_key_cache", "present_value_cache"],
        nodes,
        ["num_heads", "scale"],
    )


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
