"""The CPM-Bee model in PyTorch: the reference that every other implementation of it is compared with.

One forward serves packed training (as many keys as queries) and cached inference (earlier keys and values come in
through ``past_key_values``). The submodules are named so that the state dict carries the research code's names.

Shapes in comments: B sequences, Q new tokens, K keys, D hidden size, H heads, Dh width of a head, V vocabulary,
E extension vocabulary, R positions that get logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cpmbee.config import PHASE_BASE, RESIDUAL_SCALE, ModelConfig

IGNORE_INDEX = -100  # target of a position that does not count in the loss

KeyValue = tuple[Tensor, Tensor]


class ModelOutput(NamedTuple):
    """What one forward pass gives.

    Attributes:
        logits: (B, R or Q, V + E) in the model's dtype; the last E columns are the extension vocabulary.
        hidden_states: (B, Q, D) after the final norm.
        past_key_values: per kept attention layer the keys and values of all tokens so far, (B, H, K, Dh) each; empty
            without ``use_cache``.
    """

    logits: Tensor
    hidden_states: Tensor
    past_key_values: list[KeyValue]


class RMSNorm(nn.Module):
    """Root-mean-square norm; computed in fp32 and rounded once, whatever the dtype of its input."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)


class Linear(nn.Module):
    """A projection without bias whose result is divided by the square root of its input width."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(dim_in)
        self.weight = nn.Parameter(torch.empty(dim_out, dim_in))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim_in) -> (..., dim_out)."""
        return F.linear(x, self.weight) * self.scale


class AttentionBias(NamedTuple):
    """The relation matrix, looked up once a forward pass and shared by all layers.

    Attributes:
        bias: (B, H, Q, K), -inf where a query may not look; all zero in the rows of blind queries.
        blind: (B, 1, Q, 1), true where a query sees nothing at all.
    """

    bias: Tensor
    blind: Tensor


class BucketedBias(nn.Module):
    """One learned bias per head for every relation that two tokens can have."""

    def __init__(self, num_rows: int, num_heads: int) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Parameter(torch.empty(num_rows, num_heads))

    def forward(self, relation: Tensor) -> AttentionBias:
        """Look up ``relation`` (B, Q, K), any integer type, -1 where the query may not look at the key."""
        table = self.relative_attention_bias
        heads = table.shape[1]
        blind = (relation < 0).all(-1, keepdim=True)  # (B, Q, 1)
        # Two constant rows before the table make masking a part of the one lookup: no masked copies, and a gradient
        # that is the plain sum over the places a row was used. A query of nothing but -inf would make the softmax, and
        # through it every gradient, NaN; it gets a uniform softmax instead, and Attention throws its result away.
        extended = torch.cat((table.new_tensor([0.0, -math.inf]).expand(heads, 2), table.t()), 1)  # (H, 2 + N)
        rows = (relation.long() + 2).masked_fill(blind, 0)  # -1 has become the row of -inf
        batch, queries, keys = relation.shape
        places = rows.view(batch, 1, -1).expand(-1, heads, -1)  # (B, H, Q * K), a view
        bias = extended.expand(batch, -1, -1).gather(2, places).view(batch, heads, queries, keys)
        return AttentionBias(bias, blind[:, None])


class Attention(nn.Module):
    """Multi-head attention with a bias looked up from the relation of query and key."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout_p = config.dropout_p
        self.project_q = Linear(config.hidden_size, config.attention_dim)
        self.project_k = Linear(config.hidden_size, config.attention_dim)
        self.project_v = Linear(config.hidden_size, config.attention_dim)
        self.attention_out = Linear(config.attention_dim, config.hidden_size)

    def forward(self, x: Tensor, bias: AttentionBias, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """Attend from ``x`` (B, Q, D) to the past and ``x`` itself; returns (B, Q, D) and all keys and values."""
        q, k, v = (self._heads(project(x)) for project in (self.project_q, self.project_k, self.project_v))
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)  # (B, H, K, Dh)
        dropout_p = self.dropout_p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.bias.to(q.dtype), dropout_p=dropout_p)
        mixed = mixed.masked_fill(bias.blind, 0).transpose(1, 2).flatten(2)  # (B, Q, H * Dh)
        return self.attention_out(mixed), (k, v)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.num_heads, -1).transpose(1, 2)  # (B, H, Q, Dh)


class GatedInput(nn.Module):
    """The two input projections of a feed-forward block: gelu(w_0 x) * (w_1 x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.w_0 = Linear(config.hidden_size, config.dim_ff)
        self.w_1 = Linear(config.hidden_size, config.dim_ff)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Q, D) -> (B, Q, dim_ff)."""
        gated: Tensor = F.gelu(self.w_0(x)) * self.w_1(x)
        return gated


class FeedForward(nn.Module):
    """Gated feed-forward network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout_p)
        self.w_in = GatedInput(config)
        self.w_out = Linear(config.dim_ff, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Q, D) -> (B, Q, D)."""
        out: Tensor = self.w_out(self.dropout(self.w_in(x)))
        return out


class AttentionBlock(nn.Module):
    """Norm, attention, residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout_p)
        self.layernorm_before_attention = RMSNorm(config.hidden_size, config.eps)
        self.self_attention = Attention(config)

    def forward(self, h: Tensor, bias: AttentionBias, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """(B, Q, D) -> (B, Q, D), and all keys and values of this layer."""
        x, present = self.self_attention(self.layernorm_before_attention(h), bias, past)
        return (h + self.dropout(x)) / RESIDUAL_SCALE, present


class FeedForwardBlock(nn.Module):
    """Norm, feed-forward network, residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.dropout_p)
        self.layernorm_before_ffn = RMSNorm(config.hidden_size, config.eps)
        self.ffn = FeedForward(config)

    def forward(self, h: Tensor) -> Tensor:
        """(B, Q, D) -> (B, Q, D)."""
        out: Tensor = (h + self.dropout(self.ffn(self.layernorm_before_ffn(h)))) / RESIDUAL_SCALE
        return out


class Layer(nn.Module):
    """One layer of the encoder; a pruned block is absent, and with it its residual scaling.

    Attributes:
        recompute: keep only the input of the layer for the backward pass, and compute the rest again there
            (activation checkpointing); needs ``use_cache=False``.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.recompute = False
        self.self_att = AttentionBlock(config) if index in config.attention_layers else None
        self.ffn = FeedForwardBlock(config) if index in config.ffn_layers else None

    def forward(
        self, h: Tensor, bias: AttentionBias, past: KeyValue | None, use_cache: bool = True
    ) -> tuple[Tensor, KeyValue | None]:
        """(B, Q, D) -> (B, Q, D), and all keys and values of this layer, None where its attention is pruned."""
        if use_cache:
            return self._run(h, bias, past)
        if self.recompute and torch.is_grad_enabled():
            out: Tensor = checkpoint(lambda h, bias: self._run(h, bias, past)[0], h, bias, use_reentrant=False)
            return out, None
        return self._run(h, bias, past)[0], None

    def _run(self, h: Tensor, bias: AttentionBias, past: KeyValue | None) -> tuple[Tensor, KeyValue | None]:
        present = None
        if self.self_att is not None:
            h, present = self.self_att(h, bias, past)
        if self.ffn is not None:
            h = self.ffn(h)
        return h, present


class Encoder(nn.Module):
    """The layers and the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.output_layernorm = RMSNorm(config.hidden_size, config.eps)

    def forward(
        self, h: Tensor, bias: AttentionBias, past: Sequence[KeyValue] | None, use_cache: bool = True
    ) -> tuple[Tensor, list[KeyValue]]:
        """(B, Q, D) -> (B, Q, D), and the keys and values of every kept attention layer, if ``use_cache``."""
        presents: list[KeyValue] = []
        for layer in self.layers:
            # The past lists kept attention layers only, so the next one to use is the one of the next present; behind
            # the last kept attention there is none left, and none is needed.
            layer_past = past[len(presents)] if past is not None and len(presents) < len(past) else None
            h, present = layer(h, bias, layer_past, use_cache)
            if present is not None:
                presents.append(present)
        return self.output_layernorm(h), presents


class ExtendedEmbedding(nn.Module):
    """Token embedding, rotated by subscript, which is the output head as well.

    In a ``half`` configuration the phases are fp16 numbers, as in training; they overflow from subscript
    65504 / distance_scale on.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dim = config.hidden_size
        self.distance_scale = config.distance_scale
        self.phase_dtype = torch.float16 if config.half else torch.float32
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def forward(self, ids: Tensor, subs: Tensor) -> Tensor:
        """Embedding of base ids, each rotated by the phases of its subscript: (...) -> (..., D)."""
        x = F.embedding(ids, self.weight)
        x = x.to(torch.promote_types(x.dtype, torch.float32)) / math.sqrt(self.dim)
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=ids.device) / self.dim
        inv_freq = (1.0 / PHASE_BASE**exponents).to(self.phase_dtype)  # (D / 2,)
        phases = (subs * self.distance_scale).to(self.phase_dtype)[..., None] * inv_freq
        phases = phases.to(x.dtype)
        cos, sin = phases.cos(), phases.sin()  # (..., D / 2)
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(self.weight.dtype)

    def logits(self, h: Tensor, ext_ids: Tensor | None, ext_subs: Tensor | None) -> Tensor:
        """Scores of the base vocabulary, then of the extension vocabulary: (..., D) -> (..., V + E)."""
        base = F.linear(h / math.sqrt(self.dim), self.weight)
        if ext_ids is None or ext_subs is None:
            return base
        return torch.cat((base, F.linear(h, self(ext_ids, ext_subs).to(h.dtype))), -1)


class CpmBee(nn.Module):
    """The whole model, with the embedding as output head.

    A new model's parameters are uninitialized until `init_parameters` or a checkpoint fills them.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.input_embedding = ExtendedEmbedding(config)
        self.position_bias = BucketedBias(config.num_bias_rows, config.num_attention_heads)

    def forward(
        self,
        input_ids: Tensor,
        input_subs: Tensor,
        relation: Tensor,
        ext_ids: Tensor | None = None,
        ext_subs: Tensor | None = None,
        past_key_values: Sequence[KeyValue] | None = None,
        logits_index: Tensor | None = None,
        use_cache: bool = True,
    ) -> ModelOutput:
        """Run the new tokens of a batch.

        Args:
            input_ids: (B, Q) ids in the base vocabulary.
            input_subs: (B, Q) subscripts, 0 for ordinary tokens.
            relation: (B, Q, K) row of the bias table that applies between a query and a key, -1 where the query may
                not look; K = tokens of the past + Q. A query that sees nothing gets zeros from attention.
            ext_ids: (E,) base ids of the extension vocabulary, or None for none.
            ext_subs: (E,) its subscripts.
            past_key_values: what the previous call returned, or None at the start.
            logits_index: (B, R) int64, the positions among the Q that get logits; None for all.
            use_cache: return keys and values for later calls; training does without.

        Raises:
            ValueError: the shapes do not fit together.
        """
        _check_shapes(self.config, input_ids, input_subs, relation, past_key_values)
        if (ext_ids is None) != (ext_subs is None):
            raise ValueError("ext_ids and ext_subs must be given together")
        if past_key_values is not None and not use_cache:
            raise ValueError("past_key_values can only be continued with use_cache")
        h = self.input_embedding(input_ids, input_subs)
        h, presents = self.encoder(h, self.position_bias(relation), past_key_values, use_cache)
        selected = h
        if logits_index is not None:
            selected = h.gather(1, logits_index.long()[..., None].expand(-1, -1, h.shape[-1]))  # (B, R, D)
        return ModelOutput(self.input_embedding.logits(selected, ext_ids, ext_subs), h, presents)

    def recompute_layers(self, recompute: bool) -> None:
        """Trade time for memory in training (activation checkpointing): see `Layer.recompute`."""
        for layer in self.encoder.layers:
            layer.recompute = recompute  # type: ignore[assignment]

    @torch.no_grad()
    def init_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fill all parameters for training from scratch: norms with 1, everything else from N(0, 1).

        Unit variance suits every matrix because the division by sqrt(width) is part of the forward pass.
        """
        for parameter in self.parameters():
            parameter.copy_(initial_values(parameter.shape, generator))


def initial_values(shape: torch.Size, generator: torch.Generator | None = None) -> Tensor:
    """What a parameter of this shape is filled with for training from scratch; only norms are vectors."""
    values = torch.empty(shape)
    return values.fill_(1) if len(shape) == 1 else values.normal_(generator=generator)


def language_model_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy, in fp32, over the targets that are not `IGNORE_INDEX`.

    Args:
        logits: (..., V + E).
        targets: (...) column of the right token; an extension token counts from V.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, -2), targets.flatten().long(), ignore_index=IGNORE_INDEX)


def _check_shapes(
    config: ModelConfig,
    input_ids: Tensor,
    input_subs: Tensor,
    relation: Tensor,
    past_key_values: Sequence[KeyValue] | None,
) -> None:
    """Refuse what would otherwise broadcast or index silently into a wrong result."""
    batch, queries = input_ids.shape
    if input_subs.shape != input_ids.shape:
        raise ValueError(f"input_subs {tuple(input_subs.shape)} must have the shape of input_ids {batch, queries}")
    past = 0
    if past_key_values is not None:
        kept = len(config.attention_layers)
        if len(past_key_values) != kept:
            raise ValueError(f"past_key_values has {len(past_key_values)} layers, the model {kept} with attention")
        past = past_key_values[0][0].shape[2] if kept else relation.shape[2] - queries
    if relation.shape != (batch, queries, past + queries):
        raise ValueError(
            f"relation has shape {tuple(relation.shape)}, expected {batch, queries, past + queries}: "
            f"{queries} queries after {past} cached tokens"
        )
