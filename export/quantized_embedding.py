"""``QuantizedEmbedding`` as a model-local ONNX function: rows of the quantized matrix that is the head as well.

Standard operators only, and none of them touches more of the matrix than the rows asked for.
"""

import onnx
from onnx import TensorProto, helper

from cpmbee.export.functions import DOMAIN, DOMAIN_VERSION, FUNCTION_OPSET, int64s
from cpmbee.export.packing import LANES

QUANTIZED_EMBEDDING = "QuantizedEmbedding"


def quantized_embedding(bits: int) -> onnx.FunctionProto:
    """The body of ``QuantizedEmbedding(ids, weight, scales) -> rows`` for a matrix of 4 or 8 bits.

    ``ids`` int32 (...); ``weight`` and ``scales`` as in ``QuantizedLinear``, the vocabulary as outputs; ``rows``
    float32 (..., in_features), exactly the numbers times their scales. Attributes: those of ``QuantizedLinear``;
    ``bits`` is the one this body was made for.
    """
    zero_point = float(1 << (bits - 1))
    nodes = [
        # Where a token's numbers are: group and lane of its row, and all places between.
        helper.make_node("Cast", ["ids"], ["rows_wanted"], to=TensorProto.INT64),
        int64s("lanes", [LANES]),
        int64s("last", [-1]),
        int64s("zero", [0]),
        int64s("one", [1]),
        int64s("middle", [0, 1, 0]),
        helper.make_node("Unsqueeze", ["rows_wanted", "last"], ["row"]),
        helper.make_node("Div", ["row", "lanes"], ["group"]),
        helper.make_node("Mod", ["row", "lanes"], ["lane"]),
        helper.make_node("Sub", ["group", "group"], ["place_zero"]),
        helper.make_node("Concat", ["group", "place_zero", "lane"], ["start"], axis=-1),
        int64s("before_last", [-2]),
        helper.make_node("Unsqueeze", ["start", "before_last"], ["starts"]),  # (..., 1, 3)
        *_places("weight", "byte"),
        *_places("scales", "scale"),
        helper.make_node("GatherND", ["weight", "byte_places"], ["bytes"]),  # (..., vectors, 4)
        helper.make_node("GatherND", ["scales", "scale_places"], ["row_scales"]),  # (..., blocks)
        *(nibbles() if bits == 4 else [helper.make_node("Identity", ["bytes"], ["numbers"])]),
        helper.make_node("Cast", ["numbers"], ["unsigned"], to=TensorProto.FLOAT),
        helper.make_node("Constant", [], ["zero_point"], value_float=zero_point),
        helper.make_node("Sub", ["unsigned", "zero_point"], ["signed"]),
        # Blocks of numbers times their scales.
        helper.make_node("Shape", ["ids"], ["ids_shape"]),
        helper.make_node("Shape", ["scales"], ["num_blocks"], start=1, end=2),
        *attribute_vector("block_size"),
        helper.make_node("Concat", ["ids_shape", "num_blocks", "block_size"], ["blocks_shape"], axis=0),
        helper.make_node("Reshape", ["signed", "blocks_shape"], ["blocks"]),
        helper.make_node("Cast", ["row_scales"], ["scales_float"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["scales_float", "last"], ["block_scales"]),
        helper.make_node("Mul", ["blocks", "block_scales"], ["values"]),
        helper.make_node("Mul", ["num_blocks", "block_size"], ["padded_width"]),
        helper.make_node("Concat", ["ids_shape", "padded_width"], ["padded_shape"], axis=0),
        helper.make_node("Reshape", ["values", "padded_shape"], ["padded_rows"]),
        *attribute_vector("in_features"),
        helper.make_node("Slice", ["padded_rows", "zero", "in_features", "last"], ["rows"]),
    ]
    opsets = [helper.make_opsetid("", FUNCTION_OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    attributes = ["bits", "block_size", "in_features", "out_features"]
    return helper.make_function(
        DOMAIN, QUANTIZED_EMBEDDING, ["ids", "weight", "scales"], ["rows"], nodes, opsets, attributes=attributes
    )


def _places(tensor: str, name: str) -> list[onnx.NodeProto]:
    """Indices ``<name>_places`` (..., size, 3) of everything along the middle axis of ``tensor``."""
    size, steps = f"{name}_size", f"{name}_steps"
    return [
        helper.make_node("Shape", [tensor], [f"{size}_vector"], start=1, end=2),
        helper.make_node("Squeeze", [f"{size}_vector", "zero"], [size]),
        helper.make_node("Squeeze", ["zero", "zero"], [f"{name}_first"]),
        helper.make_node("Squeeze", ["one", "zero"], [f"{name}_stride"]),
        helper.make_node("Range", [f"{name}_first", size, f"{name}_stride"], [f"{name}_range"]),
        helper.make_node("Unsqueeze", [f"{name}_range", "last"], [f"{name}_column"]),
        helper.make_node("Mul", [f"{name}_column", "middle"], [steps]),  # (size, 3)
        helper.make_node("Add", ["starts", steps], [f"{name}_places"]),
    ]


def nibbles() -> list[onnx.NodeProto]:
    """``bytes`` (..., 4) to ``numbers`` (..., 4, 2): the low half of a byte comes first."""
    return [
        _byte("low_half", 15),
        _byte("half_a_byte", 4),
        helper.make_node("BitwiseAnd", ["bytes", "low_half"], ["even"]),
        helper.make_node("BitShift", ["bytes", "half_a_byte"], ["odd"], direction="RIGHT"),
        helper.make_node("Unsqueeze", ["even", "last"], ["even_column"]),
        helper.make_node("Unsqueeze", ["odd", "last"], ["odd_column"]),
        helper.make_node("Concat", ["even_column", "odd_column"], ["numbers"], axis=-1),
    ]


def attribute_vector(name: str) -> list[onnx.NodeProto]:
    """The calling node's attribute ``name`` as a vector of one."""
    scalar = helper.make_node("Constant", [], [f"{name}_scalar"])
    scalar.attribute.append(onnx.AttributeProto(name="value_int", type=onnx.AttributeProto.INT, ref_attr_name=name))
    return [scalar, helper.make_node("Reshape", [f"{name}_scalar", "last"], [name])]


def _byte(name: str, value: int) -> onnx.NodeProto:
    tensor = helper.make_tensor(name, TensorProto.UINT8, [1], [value])
    return helper.make_node("Constant", [], [name], value=tensor)
