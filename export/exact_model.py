"""A model whose products and cache are exact: the same file, the same graph, but no activation is rounded.

Rounding activations moves logits by about one hundredth of their range, enough to hide a slightly wrong graph. With
``QuantizedLinear`` exchanged for an fp32 product with the dequantized weights, and cache rows kept in fp32, what is
left has to agree with the reference as closely as an fp32 export does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import TensorProto, helper

from cpmbee.export.builder import CONTRIB
from cpmbee.export.dequantized import external_tensors
from cpmbee.export.exact_linear import EXACT_LINEAR
from cpmbee.export.functions import ATTENTION, DOMAIN, bucketed_attention
from cpmbee.export.packing import BlockFormat
from cpmbee.export.pieces import PiecewiseModel
from cpmbee.export.quantize import StoredMatrix
from cpmbee.export.quantized_functions import QUANTIZED_LINEAR

PRODUCTS = (QUANTIZED_LINEAR, EXACT_LINEAR)

Array = NDArray[Any]


class WideModel(PiecewiseModel):
    """A folder's model with products in fp32, a few matrices at a time.

    Args:
        model: ``model.onnx``, without its tensors.
        tensors: those of its data file.
    """

    def __init__(self, model: onnx.ModelProto, tensors: dict[str, Array]) -> None:
        super().__init__(model, tensors, use_native=False)

    def _activations(self, node: onnx.NodeProto) -> tuple[str, list[onnx.NodeProto]]:
        """What a product multiplies its matrix with, and the nodes that make it."""
        return node.input[0], []

    def _prepared(self, model: onnx.ModelProto, weights: dict[str, Array]) -> tuple[onnx.ModelProto, dict[str, Array]]:
        inlined = onnx.inliner.inline_selected_functions(model, [(DOMAIN, op) for op in PRODUCTS], exclude=True)
        nodes: list[onnx.NodeProto] = []
        for node in inlined.graph.node:
            if node.domain == DOMAIN and node.op_type in PRODUCTS:
                _, packed, scales = node.input
                matrix = f"{packed}/fp32"
                self._fed[matrix] = _dequantized(node, weights[packed], weights[scales])  # the runtime copies weights
                inlined.graph.input.append(helper.make_tensor_value_info(matrix, TensorProto.FLOAT, [None, None]))
                value, made = self._activations(node)
                product = helper.make_node("FusedMatMul", [value, matrix], node.output, domain=CONTRIB, transB=1)
                nodes += [*made, product]
            else:
                nodes.append(node)
        read = {name for node in nodes for name in node.input}
        prepared = onnx.ModelProto()
        prepared.CopyFrom(inlined)
        del prepared.graph.node[:]
        prepared.graph.node.extend(nodes)
        return prepared, {name: array for name, array in weights.items() if name in read}


class ExactModel(WideModel):
    """A folder's model with exact products and cache; the file is not touched.

    Args:
        model_file: ``model.onnx``, its data file beside it.
    """

    def __init__(self, model_file: Path) -> None:
        model = onnx.load(model_file, load_external_data=False)
        _widen_cache(model)
        super().__init__(model, external_tensors(model_file))


def _widen_cache(model: onnx.ModelProto) -> None:
    """Make a model keep its cache in fp32."""
    exact = bucketed_attention("fp32")
    scales: set[str] = set()
    for node in model.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, ATTENTION):
            scales.update([*node.input[len(exact.input) :], *node.output[len(exact.output) :]])
            del node.input[len(exact.input) :], node.output[len(exact.output) :]
    for values in (model.graph.input, model.graph.output):
        for value in [value for value in values if value.name in scales]:
            values.remove(value)
        for value in values:
            if re.match(r"(present_)?(key|value)_cache\.", value.name):
                value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for function in model.functions:
        if function.name == ATTENTION:
            function.CopyFrom(exact)


def _dequantized(node: onnx.NodeProto, packed: Array, scales: Array) -> Array:
    """A product's matrix, fp32 (outputs, inputs)."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    layout = BlockFormat(attributes["bits"], attributes["block_size"])
    return StoredMatrix(packed, scales, layout, attributes["in_features"]).rows(0, attributes["out_features"])
