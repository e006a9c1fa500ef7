"""The graph of a CPM-Bee model, assembled from its configuration alone; one function per block.

Every value that a norm reads is a pair ``(stream, addend)`` whose sum is the residual stream: adding and normalizing is
then one node. Only the first block reads the embedding, which is no sum.

Shapes in comments: B sequences, Q new tokens, K keys, R positions that get logits, E extension tokens, V vocabulary,
d hidden size, H heads, P cache rows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from cpmbee.cache_types import CacheType, layer_tensors
from cpmbee.config import ModelConfig
from cpmbee.export import weights
from cpmbee.export.assembly import FLOAT, Assembly, quantized_attributes
from cpmbee.export.builder import GraphBuilder
from cpmbee.export.functions import ATTENTION, DOMAIN
from cpmbee.export.quantize import Quantization, QuantizedMatrix
from cpmbee.export.quantized_embedding import QUANTIZED_EMBEDDING
from cpmbee.export.quantized_functions import QUANTIZED_LINEAR
from cpmbee.export.row_functions import ADD_RMS_NORM, GATED_GELU, RMS_NORM, ROTATION
from cpmbee.model.tensor_names import BIAS_TABLE, EMBEDDING

FINAL_NORM = "encoder.output_layernorm.weight"


class Residual(NamedTuple):
    """The residual stream, (B, Q, d): two values that are still to be added, or one."""

    stream: str
    addend: str | None = None


def build_graph(
    config: ModelConfig,
    precision: weights.Precision,
    quantization: Quantization | None = None,
    cache: CacheType = "fp32",
) -> GraphBuilder:
    """All nodes of the model and the tensors it needs; nothing is read yet.

    Args:
        config: the model.
        precision: of stored matrices.
        quantization: how they are quantized, where ``precision`` is a quantized one.
        cache: how its rows are stored.
    """
    dtype = np.dtype(np.float16) if precision == "fp16" else np.dtype(np.float32)
    made = Assembly(GraphBuilder(), config, dtype, quantization, cache)
    graph = made.graph
    table = graph.weight(weights.bias_table("position_bias", BIAS_TABLE, config)) if config.attention_layers else ""
    if quantization is None:
        graph.weight(weights.embedding("embedding", EMBEDDING, config, dtype))
    else:
        made.embedding = _quantized_embedding(config, quantization)
        graph.quantized_matrix(made.embedding)
    # In fp16 the head's factor 1/sqrt(d) is in the final norm; at the input it stands alone.
    factor = 1.0 if made.folds else weights.linear_scale(config.hidden_size)
    embedded = _embed(made, "embed", "input_ids", "input_subs", factor)
    if not config.attention_layers:
        (embedded,) = _select(made, embedded)
    state = Residual(embedded)
    for layer in range(config.num_hidden_layers):
        if layer in config.attention_layers:
            state = _attention_block(made, layer, state, table)
        if layer in config.ffn_layers:
            state = _ffn_block(made, layer, state)
    _head(made, state)
    return graph


def _embed(made: Assembly, scope: str, ids: str, subs: str, factor: float = 1.0) -> str:
    """Rows of the embedding times ``factor``, rotated by the phases of their subscripts, (..., d)."""
    graph, config = made.graph, made.config
    if made.embedding is None:
        rows = graph.node("Gather", ["embedding", ids], f"{scope}/rows", axis=0)
    else:
        tensors = [made.embedding.weight.name, made.embedding.scales.name]
        attributes = quantized_attributes(made.embedding)
        rows = graph.node(QUANTIZED_EMBEDDING, [ids, *tensors], f"{scope}/rows", DOMAIN, **attributes)
    if made.dtype == np.float16:
        rows = graph.node("Cast", [rows], f"{scope}/rows_fp32", to=FLOAT)
    if factor != 1.0:
        rows = made.times(rows, factor, f"{scope}/rows_scaled")
    return graph.node(
        ROTATION,
        [rows, subs, graph.constant("embed/frequencies", weights.frequencies(config))],
        f"{scope}/rotated",
        DOMAIN,
        distance_scale=float(config.distance_scale),
        half_phases=int(config.half),
    )


def _norm(made: Assembly, scope: str, source: str, state: Residual, factor: float) -> tuple[str, str]:
    """Add and normalize: the norm's output and the added stream, (B, Q, d) each."""
    balance = made.quantization.balance if made.quantization is not None and source != FINAL_NORM else None
    channels = None if balance is None else balance.norm
    weight = made.graph.weight(weights.norm_weight(f"{scope}/norm_weight", source, made.config, factor, channels))
    normed, stream = f"{scope}/normed", f"{scope}/stream"
    epsilon = weights.carried_eps(made.config.eps, made.num_blocks)
    if state.addend is None:
        made.graph.multi(RMS_NORM, [state.stream, weight], [normed], f"{scope}/norm", DOMAIN, epsilon=epsilon)
        return normed, state.stream
    inputs = [state.stream, state.addend, weight]
    made.graph.multi(ADD_RMS_NORM, inputs, [normed, stream], f"{scope}/norm", DOMAIN, epsilon=epsilon)
    return normed, stream


def _project_out(made: Assembly, scope: str, value: str, source: str, dim_in: int) -> str:
    """A block's output projection, scaled for the stream that is carried behind it: (B, Q, dim_in) -> (B, Q, d)."""
    factor = weights.linear_scale(dim_in) * weights.blocks_factor(made.num_blocks)
    dims_out = (made.config.hidden_size,)
    name, folded = f"{scope}/out_weight", factor if made.folds else 1.0
    out = made.linear(value, f"{scope}/out", name, (source,), dim_in, dims_out, folded)
    made.num_blocks += 1
    return out if made.folds else made.times(out, factor, f"{scope}/out_scaled")


def _attention_block(made: Assembly, layer: int, state: Residual, table: str) -> Residual:
    """Norm, Q, K and V in one product, attention over the cache, output projection."""
    graph, config = made.graph, made.config
    scope, source = f"layers.{layer}.attention", f"encoder.layers.{layer}.self_att"
    factor = weights.linear_scale(config.hidden_size)
    normed, stream = _norm(made, scope, f"{source}.layernorm_before_attention.weight", state, factor)
    sources = tuple(f"{source}.self_attention.project_{part}.weight" for part in "qkv")
    dims_out = (config.attention_dim,) * 3
    qkv = made.linear(normed, f"{scope}/qkv", f"{scope}/qkv_weight", sources, config.hidden_size, dims_out)
    caches = [f"{tensor}.{made.num_caches}" for tensor in layer_tensors(made.cache)]
    made.num_caches += 1
    context = f"{scope}/context"
    graph.multi(
        ATTENTION,
        [qkv, "relation", table, "slots", "new_slots", *caches],
        [context, *(f"present_{name}" for name in caches)],
        f"{scope}/attention",
        DOMAIN,
        num_heads=config.num_attention_heads,
        scale=weights.linear_scale(config.dim_head),
    )
    if made.num_caches == len(config.attention_layers):
        stream, context = _select(made, stream, context)
    out = _project_out(made, scope, context, f"{source}.self_attention.attention_out.weight", config.attention_dim)
    return Residual(stream, out)


def _ffn_block(made: Assembly, layer: int, state: Residual) -> Residual:
    """Norm, both input projections in one product, gelu gate, output projection."""
    graph, config = made.graph, made.config
    scope, source = f"layers.{layer}.ffn", f"encoder.layers.{layer}.ffn"
    factor = weights.linear_scale(config.hidden_size)
    normed, stream = _norm(made, scope, f"{source}.layernorm_before_ffn.weight", state, factor)
    sources = (f"{source}.ffn.w_in.w_0.weight", f"{source}.ffn.w_in.w_1.weight")
    dims_out = (config.dim_ff,) * 2
    both = made.linear(normed, f"{scope}/in", f"{scope}/in_weight", sources, config.hidden_size, dims_out)
    gated = graph.node(GATED_GELU, [both], f"{scope}/gated", DOMAIN)
    out = _project_out(made, scope, gated, f"{source}.ffn.w_out.weight", config.dim_ff)
    return Residual(stream, out)


def _select(made: Assembly, *values: str) -> list[str]:
    """Keep the positions that get logits, (B, Q, .) -> (B, R, .).

    Done right behind the last attention: from there on positions do not look at each other, so all others may go.
    """
    graph = made.graph
    index = graph.node("Cast", ["logits_index"], "select/index", to=TensorProto.INT64)
    column = graph.constant("last_axis", np.array([-1], np.int64))
    index = graph.node("Unsqueeze", [index, column], "select/index_column")
    return [graph.node("GatherND", [v, index], f"{v}_selected", batch_dims=1) for v in values]


def _head(made: Assembly, state: Residual) -> None:
    """Final norm, then logits of vocabulary and extension vocabulary, (B, R, V + E).

    The embedding is the left operand, ``W h^T``: as the right operand ONNX Runtime would either pack a second copy of
    it or transpose it on every call. This order reads it once, at memory speed, for up to 16 rows.
    """
    graph, config = made.graph, made.config
    factor = 1.0 if made.folds else weights.linear_scale(config.hidden_size)
    hidden, _ = _norm(made, "head", FINAL_NORM, state, factor)
    if made.embedding is not None:
        _quantized_head(made, hidden, made.embedding)
        return
    # Transposed before flattening: ONNX Runtime would fuse a transposition right before the product into it, and lose
    # its matrix-vector kernel for a single row.
    turned = graph.node("Transpose", [hidden], "head/turned", perm=[2, 0, 1])
    flat = graph.constant("head/flat", np.array([config.hidden_size, -1], np.int64))
    columns = graph.node("Reshape", [turned, flat], "head/columns")  # (d, B * R)
    matrix = "embedding"
    if made.dtype == np.float16:
        matrix = graph.node("Cast", [matrix], "head/embedding_fp32", to=FLOAT)
    base = graph.node("MatMul", [matrix, columns], "head/base")  # (V, B * R)
    extension = _embed(made, "extension", "ext_ids", "ext_subs")
    ext = graph.node("MatMul", [extension, columns], "head/ext")  # (E, B * R)
    both = graph.node("Concat", [base, ext], "head/both", axis=0)
    by_row = graph.node("Transpose", [both], "head/by_row", perm=[1, 0])  # (B * R, V + E)
    batch = graph.node("Shape", ["logits_index"], "head/batch_shape")
    rest = graph.constant("last_axis", np.array([-1], np.int64))
    shape = graph.node("Concat", [batch, rest], "head/logits_shape", axis=0)
    graph.node("Reshape", [by_row, shape], "logits")


def _quantized_head(made: Assembly, hidden: str, embedding: QuantizedMatrix) -> None:
    """Logits (B, R, V + E) of the quantized embedding; those of the extension vocabulary from exact rows of it."""
    graph = made.graph
    tensors = [embedding.weight.name, embedding.scales.name]
    attributes = quantized_attributes(embedding)
    base = graph.node(QUANTIZED_LINEAR, [hidden, *tensors], "head/base", DOMAIN, **attributes)
    extension = _embed(made, "extension", "ext_ids", "ext_subs")
    columns = graph.node("Transpose", [extension], "extension/columns", perm=[1, 0])
    ext = graph.node("MatMul", [hidden, columns], "head/ext")
    graph.node("Concat", [base, ext], "logits", axis=-1)


def _quantized_embedding(config: ModelConfig, quantization: Quantization) -> QuantizedMatrix:
    """The embedding over ``sqrt(d)``, which both of its uses want."""
    factor = weights.linear_scale(config.hidden_size)
    dims_out = (config.vocab_size,)
    return quantization.matrix("embedding", (EMBEDDING,), config.hidden_size, dims_out, factor, quantization.head_bits)
