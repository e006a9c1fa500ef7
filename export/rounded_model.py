"""A model that rounds as its format prescribes, by plain operators: it says how far rounding alone moves logits.

Activations are rounded to int8 in blocks before a product with the dequantized weights, cache rows are kept as the
folder keeps them. A kernel that is right differs from exact arithmetic by errors like these: not the same ones, for a
sum in another order tips other roundings over, but as large in the mean over many positions.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from cpmbee.cache_types import CacheType
from cpmbee.export.dequantized import external_tensors
from cpmbee.export.exact_linear import EXACT_LINEAR
from cpmbee.export.exact_model import WideModel
from cpmbee.export.functions import ATTENTION, bucketed_attention

LARGEST = 127.0  # number of an activation
TINY = 1e-30  # blocks of zeros stay zeros


class RoundedModel(WideModel):
    """A folder's model in the arithmetic of its format; the file is not touched.

    Args:
        model_file: ``model.onnx``, its data file beside it.
        cache: how its cache rows are to be stored.
    """

    def __init__(self, model_file: Path, cache: CacheType) -> None:
        model = onnx.load(model_file, load_external_data=False)
        for function in model.functions:
            if function.name == ATTENTION:
                function.CopyFrom(bucketed_attention(cache))  # whatever the file's own rounds
        super().__init__(model, external_tensors(model_file))

    def _activations(self, node: onnx.NodeProto) -> tuple[str, list[onnx.NodeProto]]:
        return super()._activations(node) if node.op_type == EXACT_LINEAR else rounded_activations(node)


def rounded_activations(node: onnx.NodeProto) -> tuple[str, list[onnx.NodeProto]]:
    """What a product multiplies its matrix with where it rounds, and the nodes that make it."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    return _rounded(node.input[0], f"{node.output[0]}/x", attributes["in_features"], attributes["block_size"])


def _rounded(value: str, scope: str, width: int, block: int) -> tuple[str, list[onnx.NodeProto]]:
    """``value`` (..., width) with each block of a row rounded to 127 steps on either side of zero."""
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, numbers: list[int]) -> str:
        tensor = helper.make_tensor(f"{scope}/{name}", TensorProto.INT64, [len(numbers)], numbers)
        nodes.append(helper.make_node("Constant", [], [f"{scope}/{name}"], value=tensor))
        return f"{scope}/{name}"

    def node(op: str, inputs: list[str], name: str) -> str:
        nodes.append(helper.make_node(op, inputs, [f"{scope}/{name}"]))
        return f"{scope}/{name}"

    for name, number in (("largest_number", LARGEST), ("tiny", TINY)):
        nodes.append(helper.make_node("Constant", [], [f"{scope}/{name}"], value_float=number))
    padding = -width % block
    rows = node("Reshape", [value, constant("row_shape", [-1, width])], "rows")
    padded = node("Pad", [rows, constant("padding", [0, 0, 0, padding])], "padded")
    blocks = node("Reshape", [padded, constant("block_shape", [-1, block])], "blocks")
    magnitude = node("ReduceMax", [node("Abs", [blocks], "magnitudes"), constant("axis", [1])], "magnitude")
    reach = node("Max", [magnitude, f"{scope}/tiny"], "reach")
    units = node("Mul", [blocks, node("Div", [f"{scope}/largest_number", reach], "inverse")], "units")
    step = node("Div", [reach, f"{scope}/largest_number"], "step")
    rounded = node("Mul", [node("Round", [units], "numbers"), step], "rounded_blocks")
    wide = node("Reshape", [rounded, constant("padded_shape", [-1, width + padding])], "rounded_rows")
    ends = [constant("begin", [0]), constant("end", [width]), constant("last", [1])]
    narrow = node("Slice", [wide, *ends], "rounded_values")
    return node("Reshape", [narrow, node("Shape", [value], "shape")], "rounded"), nodes
