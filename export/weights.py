"""What export does to a checkpoint's tensors: each fold is one function here, and `tests/export` undoes it.

Notation: d = hidden size, n = number of kept attention and feed-forward blocks before the one at hand. The model
divides its residual stream by 1.05 after every block; the graph carries ``1.05^n * h`` instead, so that the residual is
a plain addition. That costs one factor on each block's output projection and one on each norm's eps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cpmbee.config import PHASE_BASE, RESIDUAL_SCALE, ModelConfig
from cpmbee.errors import CheckpointError

Precision = Literal["fp32", "fp16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int4")
QUANTIZED: dict[str, int] = {"int8": 8, "int4": 4}  # precision: bits of a weight

CHUNK_BYTES = 32 << 20  # rows of the embedding are converted in pieces of about this size

Array = NDArray[Any]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the exported file and how it is made.

    Attributes:
        name: its name in the graph.
        shape: its shape in the file.
        dtype: its dtype in the file.
        sources: the checkpoint tensors it is made of.
        rows: makes the tensor out of the sources, in pieces along the first axis.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sources: tuple[str, ...]
    rows: Callable[[Sequence[Array]], Iterator[Array]]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return self.size * self.dtype.itemsize


def blocks_factor(num_blocks: int) -> float:
    """``1.05^n``: what the carried stream is multiplied by behind n kept blocks."""
    return RESIDUAL_SCALE**num_blocks


def carried_eps(eps: float, num_blocks: int) -> float:
    """The eps of a norm that reads the carried stream, so that it normalizes like the norm of the model's own."""
    return eps * blocks_factor(num_blocks) ** 2


def linear_scale(dim_in: int) -> float:
    """What CPM-Bee's linear layers multiply their result by."""
    return 1 / math.sqrt(dim_in)


def frequencies(config: ModelConfig) -> NDArray[np.float32]:
    """Frequencies of the rotation of embeddings by subscript, (d / 2).

    A ``half`` configuration was trained with fp16 frequencies, so they are rounded here.
    """
    exponents = np.arange(0, config.hidden_size, 2, dtype=np.float32) / np.float32(config.hidden_size)
    # The power is taken in fp64 and rounded: the nearest thing to the fp32 power functions of training frameworks.
    powers = np.power(PHASE_BASE, exponents.astype(np.float64)).astype(np.float32)
    result: NDArray[np.float32] = np.float32(1) / powers
    return result.astype(np.float16).astype(np.float32) if config.half else result


def norm_weight(
    name: str, source: str, config: ModelConfig, factor: float, channels: Callable[[str], Array] | None = None
) -> StoredTensor:
    """An RMS norm's weight times ``factor``, the scale of the linear layers that read the norm; fp32 in every file.

    ``channels`` tells what else each channel is multiplied by (`cpmbee.export.balance`).
    """

    def rows(sources: Sequence[Array]) -> Iterator[Array]:
        weight = scaled(sources[0], factor, np.dtype(np.float32))
        yield weight if channels is None else weight * channels(source)

    return StoredTensor(name, (config.hidden_size,), np.dtype(np.float32), (source,), rows)


def bias_table(name: str, source: str, config: ModelConfig) -> StoredTensor:
    """The position bias table as it is, (buckets, heads); fp32 in every file, for it is small."""

    def rows(sources: Sequence[Array]) -> Iterator[Array]:
        yield scaled(sources[0], 1.0, np.dtype(np.float32))

    shape = (config.num_bias_rows, config.num_attention_heads)
    return StoredTensor(name, shape, np.dtype(np.float32), (source,), rows)


def embedding(name: str, source: str, config: ModelConfig, dtype: np.dtype[Any]) -> StoredTensor:
    """The embedding, which is the head as well, (vocabulary, d).

    In fp32 it is divided by ``sqrt(d)``, which both of its uses want; in fp16 it stays bit for bit.
    """
    factor = linear_scale(config.hidden_size) if dtype == np.float32 else 1.0
    step = max(1, CHUNK_BYTES // (4 * config.hidden_size))

    def rows(sources: Sequence[Array]) -> Iterator[Array]:
        for start in range(0, config.vocab_size, step):
            yield scaled(sources[0][start : start + step], factor, dtype)

    return StoredTensor(name, (config.vocab_size, config.hidden_size), dtype, (source,), rows)


def stacked_linears(
    name: str,
    sources: tuple[str, ...],
    dim_in: int,
    dims_out: tuple[int, ...],
    dtype: np.dtype[Any],
    factor: float = 1.0,
) -> StoredTensor:
    """Linear layers with one input as one matrix for MatMul, (in, sum of outs), times ``factor``.

    The checkpoint keeps (out, in); transposing here spares it at run time.
    """

    def rows(tensors: Sequence[Array]) -> Iterator[Array]:
        stacked = np.empty((dim_in, sum(dims_out)), dtype)
        start = 0
        for tensor, dim_out in zip(tensors, dims_out, strict=True):
            stacked[:, start : start + dim_out] = scaled(tensor, factor, dtype).T
            start += dim_out
        yield stacked

    return StoredTensor(name, (dim_in, sum(dims_out)), dtype, sources, rows)


def scaled(tensor: Array, factor: float, dtype: np.dtype[Any]) -> Array:
    """``tensor * factor`` in ``dtype``; the product is taken in fp32, and a factor of 1 changes no bit.

    Raises:
        OverflowError: ``dtype`` cannot hold a value.
    """
    if factor != 1.0:
        tensor = tensor.astype(np.float32) * np.float32(factor)
    if tensor.dtype == dtype:
        return tensor
    with np.errstate(over="ignore"):
        result: Array = tensor.astype(dtype)
    if dtype == np.float16 and not np.isfinite(result).all():
        raise OverflowError("has values that fp16 cannot hold (beyond 65504)")
    return result


def require_finite(name: str, tensor: Array) -> None:
    """Refuse a tensor with NaN or infinite values.

    Raises:
        CheckpointError: names the tensor and the first such place.
    """
    step = max(1, CHUNK_BYTES // max(1, tensor[:1].size * 4))
    for start in range(0, len(tensor), step):
        piece = tensor[start : start + step]
        if piece.dtype == np.float16 and piece.flags.c_contiguous:
            finite = piece.view(np.uint16) & 0x7C00 != 0x7C00  # ten times as fast as NumPy's own test
        else:
            finite = np.isfinite(piece)
        if not finite.all():
            place = [int(i) for i in np.argwhere(~finite)[0]]
            place[0] += start
            raise CheckpointError(f"{name}: value at {place} is NaN or infinite; the checkpoint is damaged")
