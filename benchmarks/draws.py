"""Other weights that compute the same: draws of a model, so that errors of rounding can be averaged.

A model that is sure of nearly every token owes most of its divergence to a handful of them, and which ones tip over is
chance. One export of one checkpoint therefore says little about a way to quantize; several draws do.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cpmbee.config import ModelConfig
from cpmbee.model import load_model, save_checkpoint
from cpmbee.model.layers import AttentionBlock, FeedForwardBlock

SPREAD = 0.1  # factors of channels are between exp(-SPREAD) and exp(SPREAD)


class _Channels(NamedTuple):
    """What becomes of channels: their new order and, in that order, their factors."""

    order: Tensor
    factors: Tensor

    def undone(self) -> _Channels:
        """What reads these channels and gives what was read before."""
        return _Channels(self.order, 1 / self.factors)


def redrawn(checkpoint: Path, out: Path, seed: int) -> Path:
    """Write the same model with other weights (fp16), and its vocabulary.

    Channels inside attention and feed-forward blocks get another order and other factors, those of the hidden state
    other factors behind norms, and other signs. Their order stays: subscripts turn each channel of an embedding at a
    speed of its own. So the magnitudes of the embedding stay as well, and of its errors most.

    Args:
        checkpoint: the model's folder.
        out: folder to write.
        seed: of the draw.
    """
    model = load_model(checkpoint)
    draw = _Draw(model.config, seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AttentionBlock):
                draw.attention(module)
            elif isinstance(module, FeedForwardBlock):
                draw.feed_forward(module)
        table = model.position_bias.relative_attention_bias
        table.copy_(table[:, draw.heads].clone())
        _change(model.input_embedding.weight, None, draw.state)
    save_checkpoint(model.half(), out)
    shutil.copy(checkpoint / "vocab.txt", out)
    return out


class _Draw:
    """One draw; blocks are changed in place.

    Attributes:
        heads: their new order, the same in all layers.
        state: channels of the hidden state.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config = config
        self._generator = torch.Generator().manual_seed(seed)
        self.heads = self._order(config.num_attention_heads)
        signs = 1 - 2 * torch.randint(2, (config.hidden_size // 2,), generator=self._generator).float()
        self.state = _Channels(torch.arange(config.hidden_size), signs.repeat(2))  # a pair turns as one

    def attention(self, block: AttentionBlock) -> None:
        """Redraw an attention block."""
        part = block.self_attention
        normed = self._normed(block.layernorm_before_attention.weight)
        queries, values = self._in_heads(), self._in_heads()
        _change(part.project_q.weight, queries, normed)
        _change(part.project_k.weight, queries.undone(), normed)
        _change(part.project_v.weight, values, normed)
        _change(part.attention_out.weight, self.state, values.undone())

    def feed_forward(self, block: FeedForwardBlock) -> None:
        """Redraw a feed-forward block."""
        part = block.ffn
        normed = self._normed(block.layernorm_before_ffn.weight)
        inner = _Channels(self._order(self._config.dim_ff), self._factors(self._config.dim_ff))
        gate = _Channels(inner.order, torch.ones(self._config.dim_ff))  # no factor passes through GELU
        _change(part.w_in.w_0.weight, gate, normed)
        _change(part.w_in.w_1.weight, inner, normed)
        _change(part.w_out.weight, self.state, inner.undone())

    def _normed(self, norm: Tensor) -> _Channels:
        """Redraw a norm's weight; returns what its readers have to undo."""
        factors = self._factors(len(norm))
        norm.mul_(factors)
        return _Channels(self.state.order, self.state.factors / factors)

    def _in_heads(self) -> _Channels:
        """Channels of attention, each within its head."""
        width = self._config.dim_head
        order = torch.cat([head * width + self._order(width) for head in self.heads])
        return _Channels(order, self._factors(len(order)))

    def _order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._generator)

    def _factors(self, count: int) -> Tensor:
        return torch.exp(SPREAD * (2 * torch.rand(count, generator=self._generator) - 1))


def _change(weight: Tensor, rows: _Channels | None, columns: _Channels) -> None:
    """Reorder and scale what a matrix writes and what it reads, in place."""
    changed = weight[:, columns.order] * columns.factors
    weight.copy_(changed if rows is None else changed[rows.order] * rows.factors[:, None])
