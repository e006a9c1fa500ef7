"""Channels made even before a model is quantized: what one tensor loses, the next one gains, and nothing else changes.

A channel far above the others costs all of its block: activations and weights share a scale, in blocks of inputs. Three
kinds of channels can be scaled freely, because nothing but a linear layer reads them: those behind a norm (its weight,
and the columns of the matrices that read it), those of values in attention (rows of ``project_v``, columns of
``attention_out``), and those of the feed-forward network (rows of ``w_1``, which the gate multiplies, and columns of
``w_out``). The final norm is not among them: its reader, the head, is the embedding as well.

Factors are powers of two, so that folding them changes no bit of any product, and that verification can tell them from
rounding. Compare SmoothQuant (Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", 2022), which measures activations; here their size is taken from the weights that make them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpmbee.config import ModelConfig
from cpmbee.export.packing import BlockFormat, Float32
from cpmbee.export.parallel import in_order
from cpmbee.export.quantize import copy_rows, reciprocal
from cpmbee.export.sources import TensorSource

Array = NDArray[Any]
Float64 = NDArray[np.float64]

PANEL_BYTES = 1 << 20  # of fp32 rows that are looked at at a time
ACTIVATION_LEVELS = 127.0
GAIN = 0.7  # of the expected squared error, what may be left for factors to be worth it
MOST = 12  # of the magnitude of an exponent


class Factors(NamedTuple):
    """What a tensor of the checkpoint is multiplied by in the file.

    Attributes:
        rows: of its outputs, (outputs,).
        columns: of its inputs, (inputs,).
    """

    rows: Float32
    columns: Float32

    def apply(self, values: Float32, start: int) -> None:
        """Multiply some rows, in place.

        Args:
            values: (rows, inputs or more); what is beyond the outputs or inputs is padding.
            start: the first one's number.
        """
        if (self.columns != 1).any():
            values[:, : len(self.columns)] *= self.columns
        rows = self.rows[start : start + len(values)]
        if (rows != 1).any():
            values[: len(rows)] *= rows[:, None]

    def undo(self, values: Float32, start: int) -> None:
        """The inverse of `apply`, which loses nothing: factors are powers of two."""
        Factors(reciprocal(self.rows), reciprocal(self.columns)).apply(values, start)


class Block(NamedTuple):
    """The tensors of one attention or feed-forward block, by their names in the checkpoint.

    Attributes:
        norm: in front of it.
        readers: matrices that read the norm.
        inner: the reader whose outputs can be scaled.
        gate: the reader whose outputs multiply those of ``inner``; None in attention.
        out: the matrix that reads the inner channels.
    """

    norm: str
    readers: tuple[str, ...]
    inner: str
    gate: str | None
    out: str


def blocks_of(config: ModelConfig) -> list[Block]:
    """The kept blocks of a model."""
    blocks = []
    for layer in range(config.num_hidden_layers):
        if layer in config.attention_layers:
            source = f"encoder.layers.{layer}.self_att"
            q, k, v = (f"{source}.self_attention.project_{part}.weight" for part in "qkv")
            out = f"{source}.self_attention.attention_out.weight"
            blocks.append(Block(f"{source}.layernorm_before_attention.weight", (q, k, v), v, None, out))
        if layer in config.ffn_layers:
            source = f"encoder.layers.{layer}.ffn"
            gate, value = (f"{source}.ffn.w_in.w_{number}.weight" for number in (0, 1))
            norm, out = f"{source}.layernorm_before_ffn.weight", f"{source}.ffn.w_out.weight"
            blocks.append(Block(norm, (gate, value), value, gate, out))
    return blocks


class Balance:
    """Factors of a checkpoint's tensors, found block by block as they are asked for.

    Args:
        source: the checkpoint.
        layout: how its matrices will be stored.
    """

    def __init__(self, source: TensorSource, layout: BlockFormat) -> None:
        self._source = source
        self._layout = layout
        self._blocks = {
            name: block for block in blocks_of(source.config) for name in (block.norm, *block.readers, block.out)
        }
        self._at: Block | None = None
        self._behind_norm = self._inner = np.ones(0, np.float32)

    def norm(self, name: str) -> Float32:
        """What a norm's weight is multiplied by."""
        self._find(self._blocks[name])
        return reciprocal(self._behind_norm)

    def factors(self, name: str) -> Factors:
        """What a matrix is multiplied by."""
        block = self._blocks[name]
        self._find(block)
        return factors_in(block, name, self._source.config, self._behind_norm, self._inner)

    def _find(self, block: Block) -> None:
        """Find the factors of a block's channels."""
        if block == self._at:
            return
        gains = np.abs(self._source.read(block.norm).astype(np.float64))
        columns = np.zeros_like(gains)
        outputs: dict[str, Float64] = {}  # mean squares of what the readers make of inputs of size 1
        for name in block.readers:
            weight = self._source.read(name)
            of_columns, of_rows = _squares(weight, gains, even_rows=True)
            columns += of_columns
            outputs[name] = of_rows / len(gains)
        inner = np.sqrt(outputs[block.inner])
        if block.gate is not None:
            inner = inner * np.sqrt(outputs[block.gate])  # that of gelu is about as even as that of its input
        out_columns, _ = _squares(self._source.read(block.out), np.ones(len(inner)), even_rows=False)
        self._behind_norm = even_factors(gains, np.sqrt(columns), self._layout)
        self._inner = even_factors(inner, np.sqrt(out_columns), self._layout)
        self._at = block


def factors_in(block: Block, name: str, config: ModelConfig, behind_norm: Float32, inner: Float32) -> Factors:
    """Those of one matrix of a block.

    Args:
        block: it is in.
        name: of its tensor.
        config: the model.
        behind_norm: what weights of channels behind the norm are multiplied by.
        inner: what those of the output projection are multiplied by.
    """
    if name == block.out:
        return Factors(np.ones(config.hidden_size, np.float32), inner)
    return Factors(reciprocal(inner) if name == block.inner else np.ones_like(inner), behind_norm)


def even_factors(activations: Float64, weights: Float64, layout: BlockFormat) -> Float32:
    """Powers of two that weights of channels are multiplied by, and activations divided by.

    Args:
        activations: size of each channel's.
        weights: size of what reads each channel.
        layout: bits and block size of the weights.
    """
    best = np.ones(len(activations), np.float32)
    if not (np.isfinite(activations).all() and np.isfinite(weights).all()):
        return best
    known = (activations > 0) & (weights > 0)
    if not known.any():
        return best
    least = GAIN * _expected_error(activations, weights, layout)
    logs = np.zeros((2, len(activations)))
    logs[0, known], logs[1, known] = np.log2(activations[known]), np.log2(weights[known])
    for share in (0.5, 1.0, 0.0):  # both sides alike, activations even, weights even
        wanted = share * logs[0] - (1 - share) * logs[1]
        exponents = np.where(known, np.rint(wanted - np.median(wanted[known])), 0)
        factors = np.exp2(np.clip(exponents, -MOST, MOST))
        error = _expected_error(activations / factors, weights * factors, layout)
        if error < least:
            best, least = factors.astype(np.float32), error
    return best


def _expected_error(activations: Float64, weights: Float64, layout: BlockFormat) -> float:
    """About the squared error of outputs, if both are rounded to steps that the largest of a block sets."""
    if padding := -len(activations) % layout.block_size:
        activations, weights = (np.pad(values, (0, padding)) for values in (activations, weights))
    a, w = (np.square(values).reshape(-1, layout.block_size) for values in (activations, weights))
    rounded_activations = a.max(1) * w.sum(1) / ACTIVATION_LEVELS**2
    rounded_weights = w.max(1) * a.sum(1) / (layout.zero_point - 1) ** 2
    return float((rounded_activations + rounded_weights).sum())


def _squares(weight: Array, gains: Float64, *, even_rows: bool) -> tuple[Float64, Float64]:
    """Sums of squares: of each column, and of each row with its columns times ``gains``.

    With ``even_rows`` a row counts for columns relative to its own sum: rows have scales of their own, and where a row
    is large another matrix may make up for it.
    """
    step = max(1, PANEL_BYTES // (4 * weight.shape[1]))
    powers = np.square(gains).astype(np.float32)

    def panel(start: int) -> tuple[Float64, Float32]:
        values = np.empty((min(step, len(weight) - start), weight.shape[1]), np.float32)
        copy_rows([weight], start, 1.0, values)
        with np.errstate(over="ignore", invalid="ignore"):  # absurd weights get no factors
            np.square(values, out=values)
            rows = values @ powers
            if even_rows:
                values *= np.divide(1, rows, out=np.zeros_like(rows), where=rows > 0)[:, None]
            return values.sum(0, dtype=np.float64), rows

    panels = list(in_order(panel, range(0, len(weight), step)))
    return np.sum([columns for columns, _ in panels], axis=0), np.concatenate([rows for _, rows in panels]).astype(
        float
    )
