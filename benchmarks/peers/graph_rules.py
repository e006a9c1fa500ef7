"""What the graphs of peers may hold that are ours with another product: our rules, and the operators of that product.

Work on stored weights, which a runtime does once while it loads, is not followed: its results are weights, whatever
their shapes.
"""

from __future__ import annotations

from cpmbee.folder import SCHEMA_VERSION
from cpmbee.graph_operators import Call, Operator, last, require
from cpmbee.graph_ops import CONTRIB
from cpmbee.graph_proto import FLOAT, INT8
from cpmbee.graph_rules import RULES, GraphRules
from cpmbee.graph_values import Size, Value, shown

_PER_BLOCK = 16  # of an operator on weights: two products have some twenty nodes each
_OURS = RULES[SCHEMA_VERSION]
_WEIGHT = Value(0, (), stored=True)


def _on_weights(op: str) -> tuple[tuple[str, str], Operator]:
    """An operator that may work on weights; on all else it does as our rules say, where they know it."""
    ours = _OURS.operators.get(("", op))

    def infer(call: Call) -> list[Value | None]:
        if all(value.stored for value in call.inputs):
            return [_WEIGHT]
        if ours is None:
            raise ValueError("it works on what is no weight")
        if op == "Cast" and call.inputs[0].dtype == FLOAT == call.integer("to"):  # behind the product
            return [call.inputs[0]]
        return list(ours.infer(call))

    return ("", op), Operator(infer, (0, 1, 2, 3), attributes=None, either=(0, 1, 2), per_block=_PER_BLOCK, beside=24)


def _mat_mul_n_bits(call: Call) -> list[Value | None]:
    value = call.inputs[0]
    require(value, FLOAT)
    if last(value) != Size(call.integer("K")):
        raise ValueError(f"its input {shown(value.shape)} has not {call.integer('K')} columns")
    return [Value(FLOAT, (*value.shape[:-1], Size(call.integer("N"))))]


def _dynamic_quantize_mat_mul(call: Call) -> list[Value | None]:
    value, weight, scales = call.inputs
    require(value, FLOAT)
    require(weight, INT8, last(value), last(scales))
    require(scales, FLOAT, last(scales))
    return [Value(FLOAT, (*value.shape[:-1], last(scales)))]


_N_BITS = {"K": int, "N": int, "bits": int, "block_size": int, "accuracy_level": int}
PEER_RULES: dict[int, GraphRules] = {
    SCHEMA_VERSION: _OURS.extended(
        operators={
            **dict(map(_on_weights, ("Cast", "Concat", "Constant", "Reshape", "Shape", "Slice", "Transpose"))),
            (CONTRIB, "MatMulNBits"): Operator(_mat_mul_n_bits, 3, attributes=_N_BITS, stored=(1, 2), per_block=2),
            (CONTRIB, "DynamicQuantizeMatMul"): Operator(_dynamic_quantize_mat_mul, 3, stored=(1, 2), per_block=2),
        },
        dtypes=frozenset((INT8,)),
    )
}
