"""What happens to rows of activations between the products, as model-local ONNX functions: gate, norms, rotation.

Gate and norm are written in the patterns that ONNX Runtime fuses into single operators of its own.
"""

import math

import onnx
from onnx import TensorProto, helper

from cpmbee.export.functions import DOMAIN, DOMAIN_VERSION, FUNCTION_OPSET, int64s

GATED_GELU = "GatedGelu"
RMS_NORM = "RMSNorm"
ADD_RMS_NORM = "AddRMSNorm"
ROTATION = "SubscriptRotation"


def gated_gelu() -> onnx.FunctionProto:
    """The body of ``GatedGelu(both) -> gated``.

    ``both`` float32 (..., 2 * width), gates and then values; ``gated`` float32 (..., width) is ``gelu(gates) *
    values`` with the exact gelu, that of erf.
    """
    nodes = [
        helper.make_node("Split", ["both"], ["gate", "value"], axis=-1, num_outputs=2),
        helper.make_node("Constant", [], ["root"], value_float=math.sqrt(2)),
        helper.make_node("Constant", [], ["one"], value_float=1.0),
        helper.make_node("Constant", [], ["half"], value_float=0.5),
        helper.make_node("Div", ["gate", "root"], ["scaled"]),
        helper.make_node("Erf", ["scaled"], ["erf"]),
        helper.make_node("Add", ["erf", "one"], ["twice"]),
        helper.make_node("Mul", ["gate", "twice"], ["double"]),
        helper.make_node("Mul", ["double", "half"], ["open"]),
        helper.make_node("Mul", ["open", "value"], ["gated"]),
    ]
    return _function(GATED_GELU, ["both"], ["gated"], nodes)


def rms_norm() -> onnx.FunctionProto:
    """The body of ``RMSNorm(x, weight) -> normed``: ``x / sqrt(mean(x^2) + epsilon) * weight`` over the last axis.

    ``x`` and ``normed`` float32 (..., width), ``weight`` float32 (width). Attribute: ``epsilon``.
    """
    epsilon = helper.make_node("Constant", [], ["epsilon"])
    epsilon.attribute.append(_float_attribute("value_float", "epsilon"))
    nodes = [
        epsilon,
        int64s("last", [-1]),
        helper.make_node("Constant", [], ["two"], value_float=2.0),
        helper.make_node("Pow", ["x", "two"], ["squares"]),
        helper.make_node("ReduceMean", ["squares", "last"], ["mean"], keepdims=1),
        helper.make_node("Add", ["mean", "epsilon"], ["shifted"]),
        helper.make_node("Sqrt", ["shifted"], ["size"]),
        helper.make_node("Div", ["x", "size"], ["unit"]),
        helper.make_node("Mul", ["unit", "weight"], ["normed"]),
    ]
    return _function(RMS_NORM, ["x", "weight"], ["normed"], nodes, ["epsilon"])


def add_rms_norm() -> onnx.FunctionProto:
    """The body of ``AddRMSNorm(stream, addend, weight) -> (normed, sum)``: `rms_norm` of ``sum = stream + addend``.

    ``stream``, ``addend``, ``normed`` and ``sum`` float32 (batch, queries, width), ``weight`` float32 (width).
    Attribute: ``epsilon``.
    """
    norm = helper.make_node(RMS_NORM, ["sum", "weight"], ["normed"], domain=DOMAIN)
    norm.attribute.append(_float_attribute("epsilon", "epsilon"))
    nodes = [helper.make_node("Add", ["stream", "addend"], ["sum"]), norm]
    return _function(ADD_RMS_NORM, ["stream", "addend", "weight"], ["normed", "sum"], nodes, ["epsilon"])


def subscript_rotation(half_phases: bool) -> onnx.FunctionProto:
    """The body of ``SubscriptRotation(rows, subscripts, frequencies) -> rotated``.

    ``rows`` and ``rotated`` float32 (..., 2 * pairs); ``subscripts`` int32 (...); ``frequencies`` float32 (pairs). The
    pair of entries ``i`` and ``pairs + i`` is turned by the phase ``subscript * distance_scale * frequencies[i]``.
    Attributes: ``distance_scale``; ``half_phases``, 1 where positions and phases are rounded to fp16 as in training,
    is the one this body was made for.
    """
    scale = helper.make_node("Constant", [], ["distance_scale"])
    scale.attribute.append(_float_attribute("value_float", "distance_scale"))
    nodes = [
        scale,
        int64s("last", [-1]),
        helper.make_node("Cast", ["subscripts"], ["subscripts_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["subscripts_float", "distance_scale"], ["exact_position"]),
        *_rounded("exact_position", "position", half_phases),
        helper.make_node("Unsqueeze", ["position", "last"], ["position_column"]),
        helper.make_node("Mul", ["position_column", "frequencies"], ["exact_phase"]),
        *_rounded("exact_phase", "phase", half_phases),
        helper.make_node("Cos", ["phase"], ["cos"]),
        helper.make_node("Sin", ["phase"], ["sin"]),
        helper.make_node("Split", ["rows"], ["first", "second"], axis=-1, num_outputs=2),
        helper.make_node("Mul", ["first", "cos"], ["first_cos"]),
        helper.make_node("Mul", ["second", "sin"], ["second_sin"]),
        helper.make_node("Sub", ["first_cos", "second_sin"], ["new_first"]),
        helper.make_node("Mul", ["second", "cos"], ["second_cos"]),
        helper.make_node("Mul", ["first", "sin"], ["first_sin"]),
        helper.make_node("Add", ["second_cos", "first_sin"], ["new_second"]),
        helper.make_node("Concat", ["new_first", "new_second"], ["rotated"], axis=-1),
    ]
    inputs, attributes = ["rows", "subscripts", "frequencies"], ["distance_scale", "half_phases"]
    return _function(ROTATION, inputs, ["rotated"], nodes, attributes)


def _rounded(value: str, result: str, half: bool) -> list[onnx.NodeProto]:
    """``result``: ``value`` rounded to fp16 if ``half``, else ``value`` itself."""
    if not half:
        return [helper.make_node("Identity", [value], [result])]
    return [
        helper.make_node("Cast", [value], [f"{value}_fp16"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", [f"{value}_fp16"], [result], to=TensorProto.FLOAT),
    ]


def _function(
    name: str, inputs: list[str], outputs: list[str], nodes: list[onnx.NodeProto], attributes: list[str] | None = None
) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", FUNCTION_OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return helper.make_function(DOMAIN, name, inputs, outputs, nodes, opsets, attributes=attributes or [])


def _float_attribute(name: str, attribute: str) -> onnx.AttributeProto:
    """An attribute ``name`` whose value is the calling node's ``attribute``."""
    return onnx.AttributeProto(name=name, type=onnx.AttributeProto.FLOAT, ref_attr_name=attribute)
