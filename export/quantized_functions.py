"""``QuantizedLinear`` as a model-local ONNX function of ONNX Runtime's own ``MatMulNBits``.

The layout of the weight is chosen for the native kernels (``csrc/quantized_kernel.h``). It is a byte transposition of
what ``MatMulNBits`` takes, so a few foldable operators in front undo it. Runtimes know ``MatMulNBits`` with 4 bits from
1.18 on and with 8 bits from 1.22 on; before that, 8-bit weights need the native kernels.
"""

import onnx
from onnx import TensorProto, helper

from cpmbee.export.functions import DOMAIN, DOMAIN_VERSION, FUNCTION_OPSET, int64s

QUANTIZED_LINEAR = "QuantizedLinear"
CONTRIB = "com.microsoft"
LANES = 16  # outputs that one vector of weights holds
BLOCK_SIZES = (32, 64, 128)
ZERO_POINTS = {4: 8, 8: 128}  # bits: the number that stands for 0
_INT8_ACTIVATIONS = 4  # accuracy_level


def quantized_linear() -> onnx.FunctionProto:
    """The body of ``QuantizedLinear(x, weight, scales) -> y``.

    ``x`` float32 (..., in_features); ``weight`` uint8 (N / 16, K * bits / 32, 16, 4); ``scales`` float16 (N / 16,
    K / block_size, 16); ``y`` float32 (..., out_features). N and K are ``out_features`` and ``in_features``, padded to
    multiples of 16 and ``block_size``. Attributes: ``bits``, ``block_size``, ``in_features``, ``out_features``.
    """
    multiply = helper.make_node(
        "MatMulNBits", ["x", "weight_rows", "scale_rows"], ["product"], domain=CONTRIB, accuracy_level=_INT8_ACTIVATIONS
    )
    for name, ours in {"K": "in_features", "N": "out_features", "bits": "bits", "block_size": "block_size"}.items():
        multiply.attribute.append(_reference(name, ours))
    outputs = helper.make_node("Constant", [], ["outputs"])
    outputs.attribute.append(_reference("value_int", "out_features"))
    nodes = [
        outputs,
        int64s("vector", [-1]),
        helper.make_node("Reshape", ["outputs", "vector"], ["end"]),
        int64s("begin", [0]),
        # Scales: (N / 16, blocks, 16) to (out_features, blocks).
        helper.make_node("Cast", ["scales"], ["scales_float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["scales_float"], ["scales_by_output"], perm=[0, 2, 1]),
        helper.make_node("Shape", ["scales"], ["blocks"], start=1, end=2),
        helper.make_node("Concat", ["vector", "blocks"], ["scales_shape"], axis=0),
        helper.make_node("Reshape", ["scales_by_output", "scales_shape"], ["padded_scales"]),
        helper.make_node("Slice", ["padded_scales", "begin", "end"], ["scales_matrix"]),
        helper.make_node("Reshape", ["scales_matrix", "vector"], ["scale_rows"]),
        # Weight: (N / 16, vectors, 16, 4) to (out_features, blocks, bytes of a block).
        helper.make_node("Transpose", ["weight"], ["weight_by_output"], perm=[0, 2, 1, 3]),
        helper.make_node("Shape", ["padded_scales"], ["matrix_shape"]),  # (N, blocks)
        helper.make_node("Concat", ["matrix_shape", "vector"], ["weight_shape"], axis=0),
        helper.make_node("Reshape", ["weight_by_output", "weight_shape"], ["padded_weight"]),
        helper.make_node("Slice", ["padded_weight", "begin", "end"], ["weight_rows"]),
        multiply,
        # Nothing to do, but it tells type inference, which does not know MatMulNBits, what comes out.
        helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
    ]
    opsets = [
        helper.make_opsetid("", FUNCTION_OPSET),
        helper.make_opsetid(DOMAIN, DOMAIN_VERSION),
        helper.make_opsetid(CONTRIB, 1),
    ]
    attributes = ["bits", "block_size", "in_features", "out_features"]
    return helper.make_function(
        DOMAIN, QUANTIZED_LINEAR, ["x", "weight", "scales"], ["y"], nodes, opsets, attributes=attributes
    )


def _reference(name: str, attribute: str) -> onnx.AttributeProto:
    """An integer attribute ``name`` whose value is the calling node's ``attribute``."""
    return onnx.AttributeProto(name=name, type=onnx.AttributeProto.INT, ref_attr_name=attribute)
