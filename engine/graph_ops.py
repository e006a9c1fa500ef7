"""Our own operators in the graphs that exports write, and the two of ONNX Runtime that early exports used."""

from __future__ import annotations

import math

from cpmbee.cache_types import CacheType, layer_tensors
from cpmbee.config import ModelConfig
from cpmbee.graph_operators import Call, Operator, known, last, require
from cpmbee.graph_proto import FLOAT, FLOAT16, INT8, INT16, INT32, UINT8
from cpmbee.graph_values import Size, Value, quotient, shown

DOMAIN = "cpm_bee"
CONTRIB = "com.microsoft"
PRESENT = "present_"  # what an output that is a cache with the new rows in it is called, before the name of its input
_LANES, _LANE_BYTES = 16, 4  # of quantized matrices: outputs side by side, bytes of each
_BATCH, _QUERIES, _KEYS, _ROWS = (Size(1, (symbol,)) for symbol in "BQKP")
_CACHE_NUMBERS: dict[CacheType, int] = {"fp32": FLOAT, "fp16": FLOAT16, "int8": INT8}


def cache_value(name: str, config: ModelConfig, cache: CacheType) -> Value:
    """What a cache input of the graph is, by its name (``key_cache.0``, ``key_scales.0``)."""
    shape = (_ROWS, Size(config.num_attention_heads))
    if "scales" in name:
        return Value(FLOAT, shape, source=name)
    return Value(_CACHE_NUMBERS[cache], (*shape, Size(config.dim_head)), source=name)


def _real(call: Call, name: str) -> float:
    value = call.node.attributes.get(name)
    if not isinstance(value, float) or not math.isfinite(value):
        raise ValueError(f"{name} is not a finite number")
    return value


def _attention(call: Call) -> list[Value | None]:
    config, node = call.config, call.node
    qkv, relation, table, slots, new_slots, *caches = call.inputs
    heads = config.num_attention_heads
    if call.integer("num_heads") != heads:
        raise ValueError(f"num_heads is {call.integer('num_heads')}, and the model has {heads}")
    _real(call, "scale")
    require(qkv, FLOAT, _BATCH, _QUERIES, Size(3 * config.attention_dim))
    require(relation, INT16, _BATCH, _QUERIES, _KEYS)
    require(table, FLOAT, Size(config.num_bias_rows), Size(heads))
    require(slots, INT32, _BATCH, _KEYS)
    require(new_slots, INT32, _BATCH, _QUERIES)
    names = [name.rpartition(".")[0] for name in node.inputs[5:]]
    if names != list(layer_tensors(call.cache)) or [value.source for value in caches] != list(node.inputs[5:]):
        raise ValueError(f"its caches are {', '.join(node.inputs[5:])}")
    if list(node.outputs[1:]) != [f"{PRESENT}{name}" for name in node.inputs[5:]]:
        raise ValueError(f"it writes the caches to {', '.join(node.outputs[1:])}")
    context = Value(FLOAT, (_BATCH, _QUERIES, Size(config.attention_dim)))
    return [context, *(value._replace(source="") for value in caches)]


def _rms_norm(call: Call) -> list[Value | None]:
    value, weight = call.inputs
    _real(call, "epsilon")
    require(value, FLOAT)
    require(weight, FLOAT, last(value))
    return [Value(FLOAT, value.shape)]


def _add_rms_norm(call: Call) -> list[Value | None]:
    stream, addend, weight = call.inputs
    _real(call, "epsilon")
    require(stream, FLOAT)
    require(addend, FLOAT, *stream.shape)
    require(weight, FLOAT, last(stream))
    if len(stream.shape) != 3:
        raise ValueError(f"it normalizes {shown(stream.shape)}")
    return [Value(FLOAT, stream.shape)] * 2


def _skip_norm(call: Call) -> list[Value | None]:
    normed, stream = _add_rms_norm(call)
    return [normed, None, None, stream]


def _gelu(call: Call) -> list[Value | None]:
    require(call.inputs[0], FLOAT)
    return [Value(FLOAT, call.inputs[0].shape)]


def _gated_gelu(call: Call) -> list[Value | None]:
    (both,) = call.inputs
    require(both, FLOAT)
    known(last(both))
    return [Value(FLOAT, (*both.shape[:-1], quotient(last(both), Size(2))))]


def _rotation(call: Call) -> list[Value | None]:
    rows, subscripts, frequencies = call.inputs
    _real(call, "distance_scale")
    if call.integer("half_phases") != call.config.half:
        raise ValueError(f"half_phases is {call.integer('half_phases')}, and config.json says {int(call.config.half)}")
    require(subscripts, INT32)
    width = Size(2 * known(last(frequencies)))
    require(frequencies, FLOAT, last(frequencies))
    require(rows, FLOAT, *subscripts.shape, width)
    return [Value(FLOAT, rows.shape)]


def _matrix(call: Call, weight: Value, scales: Value) -> tuple[int, int]:
    """Inputs and outputs of a stored quantized matrix."""
    bits, block, dim_in, dim_out = (call.integer(name) for name in _MATRIX)
    if bits not in (4, 8) or block not in (32, 64, 128) or dim_in < 1 or dim_out < 1:
        raise ValueError(f"no matrix has {bits} bits in blocks of {block}, {dim_in} inputs and {dim_out} outputs")
    groups, blocks = -(-dim_out // _LANES), -(-dim_in // block)
    vectors = blocks * block * bits // (8 * _LANE_BYTES)
    require(weight, UINT8, Size(groups), Size(vectors), Size(_LANES), Size(_LANE_BYTES))
    require(scales, FLOAT16, Size(groups), Size(blocks), Size(_LANES))
    return dim_in, dim_out


def _quantized_linear(call: Call) -> list[Value | None]:
    value, weight, scales = call.inputs
    dim_in, dim_out = _matrix(call, weight, scales)
    require(value, FLOAT)
    if last(value) != Size(dim_in):
        raise ValueError(f"its input {shown(value.shape)} has not {dim_in} columns")
    return [Value(FLOAT, (*value.shape[:-1], Size(dim_out)))]


def _quantized_embedding(call: Call) -> list[Value | None]:
    ids, weight, scales = call.inputs
    dim_in, _ = _matrix(call, weight, scales)
    require(ids, INT32)
    return [Value(FLOAT, (*ids.shape, Size(dim_in)))]


_MATRIX = {"bits": int, "block_size": int, "in_features": int, "out_features": int}
_EPSILON = {"epsilon": float}


OWN: dict[tuple[str, str], Operator] = {
    (DOMAIN, "AddRMSNorm"): Operator(_add_rms_norm, 3, 2, _EPSILON, stored=(2,), per_block=1),
    (DOMAIN, "BucketedAttention"): Operator(
        _attention,
        inputs=(7, 9),
        outputs=(3, 5),
        attributes={"num_heads": int, "scale": float},
        stored=(2,),
        per_block=1,
        keeps_rows=True,
        variant=lambda call: call.cache,
    ),
    (DOMAIN, "GatedGelu"): Operator(_gated_gelu, 1, per_block=1),
    (DOMAIN, "QuantizedEmbedding"): Operator(
        _quantized_embedding, 3, attributes=_MATRIX, stored=(1, 2), variant=lambda call: str(call.integer("bits"))
    ),
    (DOMAIN, "ExactLinear"): Operator(
        _quantized_linear,
        3,
        attributes=_MATRIX,
        stored=(1, 2),
        per_block=2,
        variant=lambda call: str(call.integer("bits")),
    ),
    (DOMAIN, "QuantizedLinear"): Operator(_quantized_linear, 3, attributes=_MATRIX, stored=(1, 2), per_block=2),
    (DOMAIN, "RMSNorm"): Operator(_rms_norm, 2, attributes=_EPSILON, stored=(1,)),
    (DOMAIN, "SubscriptRotation"): Operator(
        _rotation,
        3,
        attributes={"distance_scale": float, "half_phases": int},
        stored=(2,),
        variant=lambda call: str(call.integer("half_phases")),
    ),
}
RUNTIME: dict[tuple[str, str], Operator] = {
    (CONTRIB, "Gelu"): Operator(_gelu, 1, per_block=1),
    (CONTRIB, "SkipSimplifiedLayerNormalization"): Operator(_skip_norm, 3, 4, _EPSILON, stored=(2,), per_block=1),
}
