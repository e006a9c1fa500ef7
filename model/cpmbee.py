"""The CPM-Bee model in PyTorch: the reference that every other implementation of it is compared with.

One forward serves packed training (as many keys as queries) and cached inference (earlier keys and values come in
through ``past_key_values``). The submodules are named so that the state dict carries the research code's names.

Shapes in comments: B sequences, Q new tokens, K keys, D hidden size, H heads, Dh width of a head, V vocabulary, E
extension vocabulary, R positions that get logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cpmbee.config import PHASE_BASE, ModelConfig
from cpmbee.errors import ConfigError
from cpmbee.model.layers import AttentionBias, BucketedBias, KeyValue, Layer, RMSNorm

IGNORE_INDEX = -100  # target of a position that does not count in the loss


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
            ConfigError: the shapes do not fit together.
        """
        _check_shapes(self.config, input_ids, input_subs, relation, past_key_values)
        if (ext_ids is None) != (ext_subs is None):
            raise ConfigError("ext_ids and ext_subs must be given together")
        if past_key_values is not None and not use_cache:
            raise ConfigError("past_key_values can only be continued with use_cache")
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
        raise ConfigError(f"input_subs {tuple(input_subs.shape)} must have the shape of input_ids {batch, queries}")
    past = 0
    if past_key_values is not None:
        kept = len(config.attention_layers)
        if len(past_key_values) != kept:
            raise ConfigError(f"past_key_values has {len(past_key_values)} layers, the model {kept} with attention")
        past = past_key_values[0][0].shape[2] if kept else relation.shape[2] - queries
    if relation.shape != (batch, queries, past + queries):
        raise ConfigError(
            f"relation has shape {tuple(relation.shape)}, expected {batch, queries, past + queries}: "
            f"{queries} queries after {past} cached tokens"
        )
