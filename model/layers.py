"""The layers of CPM-Bee in PyTorch: norms, projections, attention with a looked-up bias, gated feed-forward network.

The submodules are named so that the state dict carries the research code's names.

Shapes in comments: B sequences, Q new tokens, K keys, D hidden size, H heads, Dh width of a head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cpmbee.config import RESIDUAL_SCALE, ModelConfig

KeyValue = tuple[Tensor, Tensor]


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
