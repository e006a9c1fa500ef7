"""The storage format of quantized matrices: blocks of inputs with one scale, outputs in groups of 16 lanes.

A matrix (outputs, inputs), as checkpoints keep it, is stored as bytes ``[outputs / 16, inputs / p, 16, 4]``, p = 8 for
4 bits and 4 for 8 bits: four bytes of each of 16 outputs side by side, so that a vector register takes 16 outputs at
once. A byte holds two 4-bit values (even input low, odd input high) or one of 8 bits. Values are unsigned; the value
meant is ``(q - zero point) * scale``, with one fp16 scale per output and block, stored ``[outputs / 16, blocks, 16]``.
Outputs are padded to a multiple of 16 and inputs to a multiple of the block with values of zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LANES = 16  # outputs side by side
LANE_BYTES = 4
BLOCK_SIZES = (32, 64, 128)
BITS = (4, 8)

Uint8 = NDArray[np.uint8]
Float16 = NDArray[np.float16]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class BlockFormat:
    """How a matrix is stored.

    Attributes:
        bits: of one weight, 4 or 8.
        block_size: inputs that share a scale: 32, 64 or 128.
    """

    bits: int
    block_size: int

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.block_size not in BLOCK_SIZES:
            raise ValueError(f"no storage format has {self.bits} bits in blocks of {self.block_size}")

    @property
    def zero_point(self) -> int:
        """The stored number that means 0."""
        return 1 << (self.bits - 1)

    @property
    def group(self) -> int:
        """Inputs in the four bytes of a lane."""
        return 8 * LANE_BYTES // self.bits

    def padded(self, dim_out: int, dim_in: int) -> tuple[int, int]:
        """Outputs and inputs as they are stored."""
        return -(-dim_out // LANES) * LANES, -(-dim_in // self.block_size) * self.block_size

    def weight_shape(self, dim_out: int, dim_in: int) -> tuple[int, ...]:
        """Shape of the stored bytes."""
        rows, columns = self.padded(dim_out, dim_in)
        return rows // LANES, columns // self.group, LANES, LANE_BYTES

    def scales_shape(self, dim_out: int, dim_in: int) -> tuple[int, ...]:
        """Shape of the stored scales."""
        rows, columns = self.padded(dim_out, dim_in)
        return rows // LANES, columns // self.block_size, LANES


def pack(values: Uint8, layout: BlockFormat) -> Uint8:
    """Numbers (outputs, inputs), both padded, as bytes in the order of the file."""
    rows, columns = values.shape
    lanes: Uint8 = values.reshape(rows // LANES, LANES, columns // layout.group, layout.group)
    if layout.bits == 4:
        lanes = lanes[..., 0::2] | np.left_shift(lanes[..., 1::2], np.uint8(4))
    packed: Uint8 = np.ascontiguousarray(lanes.transpose(0, 2, 1, 3))
    return packed


def unpack(packed: Uint8, layout: BlockFormat) -> Uint8:
    """The inverse of `pack`."""
    lanes = packed.transpose(0, 2, 1, 3)  # (groups of outputs, lane, groups of inputs, byte)
    if layout.bits == 4:
        lanes = np.stack((lanes & 15, lanes >> 4), axis=-1)
    values: Uint8 = lanes.reshape(packed.shape[0] * LANES, -1)
    return values


def dequantize(packed: Uint8, scales: Float16, dim_out: int, dim_in: int, layout: BlockFormat) -> Float32:
    """What the stored numbers mean: fp32 (outputs, inputs), without the padding.

    Each value is one product of an integer and an fp16 scale, exact in fp32.

    Args:
        packed: stored bytes, or those of some groups of outputs.
        scales: their scales.
        dim_out: outputs, the padding not counted.
        dim_in: inputs, likewise.
        layout: bits and block size.
    """
    values = unpack(packed, layout).astype(np.float32) - np.float32(layout.zero_point)
    by_output = scales.astype(np.float32).transpose(0, 2, 1).reshape(len(values), -1, 1)
    whole = (values.reshape(len(values), -1, layout.block_size) * by_output).reshape(len(values), -1)
    result: Float32 = whole[:dim_out, :dim_in]
    return result


def as_half(values: NDArray[Any]) -> Float16:
    """To fp16, infinite beyond its range."""
    with np.errstate(over="ignore"):
        half: Float16 = values.astype(np.float16)
    return half
