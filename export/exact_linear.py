"""``ExactLinear``: ``QuantizedLinear`` whose activations stay fp32, as a model-local ONNX function.

For the few layers whose activations do not bear rounding to int8. It has no kernel: its body dequantizes the matrix by
standard operators, which a runtime does once, when it loads the model, and keeps 4 bytes a weight of it in memory.
"""

import onnx
from onnx import TensorProto, helper

from cpmbee.export.functions import DOMAIN, DOMAIN_VERSION, FUNCTION_OPSET, int64s
from cpmbee.export.quantized_embedding import attribute_vector, nibbles

EXACT_LINEAR = "ExactLinear"


def exact_linear(bits: int) -> onnx.FunctionProto:
    """The body of ``ExactLinear(x, weight, scales) -> y``.

    Inputs, output and attributes are those of ``QuantizedLinear``; ``bits`` is the one this body was made for.
    """
    zero_point = float(1 << (bits - 1))
    nodes = [
        int64s("last", [-1]),
        # Numbers: (N / 16, vectors, 16, bytes or nibbles) to (N / 16, 16, blocks, block).
        helper.make_node("Transpose", ["weight"], ["bytes"], perm=[0, 2, 1, 3]),
        *(nibbles() if bits == 4 else [helper.make_node("Identity", ["bytes"], ["numbers"])]),
        helper.make_node("Cast", ["numbers"], ["unsigned"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["zero_point"], value_float=zero_point),
        helper.make_node("Sub", ["unsigned", "zero_point"], ["signed"]),
        helper.make_node("Transpose", ["scales"], ["scales_by_output"], perm=[0, 2, 1]),
        helper.make_node("Shape", ["scales_by_output"], ["block_rows"]),
        helper.make_node("Concat", ["block_rows", "last"], ["blocks_shape"], axis=0),
        helper.make_node("Reshape", ["signed", "blocks_shape"], ["blocks"]),
        # Times their scales: (N, K), then without the padding.
        helper.make_node("Cast", ["scales_by_output"], ["scales_float"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["scales_float", "last"], ["block_scales"]),
        helper.make_node("Mul", ["blocks", "block_scales"], ["values"]),
        helper.make_node("Flatten", ["values"], ["padded"], axis=2),
        int64s("begins", [0, 0]),
        *attribute_vector("out_features"),
        *attribute_vector("in_features"),
        helper.make_node("Concat", ["out_features", "in_features"], ["ends"], axis=0),
        helper.make_node("Slice", ["padded", "begins", "ends"], ["matrix"]),
        helper.make_node("Transpose", ["matrix"], ["columns"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "columns"], ["y"]),
    ]
    opsets = [helper.make_opsetid("", FUNCTION_OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    attributes = ["bits", "block_size", "in_features", "out_features"]
    return helper.make_function(
        DOMAIN, EXACT_LINEAR, ["x", "weight", "scales"], ["y"], nodes, opsets, attributes=attributes
    )
