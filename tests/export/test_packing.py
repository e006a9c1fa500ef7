"""The storage format: what goes in comes out, and every byte is where the kernels look for it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpmbee.export.packing import BLOCK_SIZES, BlockFormat, dequantize, pack, unpack

formats = st.builds(BlockFormat, st.sampled_from([4, 8]), st.sampled_from(BLOCK_SIZES))


def random_numbers(layout: BlockFormat, dim_out: int, dim_in: int) -> np.ndarray:
    shape = layout.padded(dim_out, dim_in)
    return np.random.default_rng(dim_out).integers(0, 1 << layout.bits, shape, np.uint8)


@given(formats, st.integers(1, 70), st.integers(1, 300))
def test_numbers_come_back(layout: BlockFormat, dim_out: int, dim_in: int) -> None:
    numbers = random_numbers(layout, dim_out, dim_in)
    packed = pack(numbers, layout)
    assert packed.shape == layout.weight_shape(dim_out, dim_in)
    assert packed.flags.c_contiguous
    np.testing.assert_array_equal(unpack(packed, layout), numbers)


@given(formats, st.integers(1, 70), st.integers(1, 300))
def test_values_are_numbers_times_scales(layout: BlockFormat, dim_out: int, dim_in: int) -> None:
    numbers = random_numbers(layout, dim_out, dim_in)
    rng = np.random.default_rng(dim_in)
    scales = rng.standard_normal(layout.scales_shape(dim_out, dim_in)).astype(np.float16)
    values = dequantize(pack(numbers, layout), scales, dim_out, dim_in, layout)
    assert values.shape == (dim_out, dim_in)
    for n, k in {(0, 0), (dim_out - 1, dim_in - 1), (dim_out // 2, dim_in // 2), (dim_out - 1, 0)}:
        scale = scales[n // 16, k // layout.block_size, n % 16].astype(np.float32)
        assert values[n, k] == (np.float32(numbers[n, k]) - layout.zero_point) * scale


def test_bytes_of_four_bits() -> None:
    layout = BlockFormat(4, 32)
    numbers = random_numbers(layout, 32, 64)
    packed = pack(numbers, layout)
    for n, k in [(0, 0), (17, 9), (31, 63), (5, 38)]:
        byte = packed[n // 16, k // 8, n % 16, k % 8 // 2]
        assert (byte >> 4 if k % 2 else byte & 15) == numbers[n, k]


def test_bytes_of_eight_bits() -> None:
    layout = BlockFormat(8, 32)
    numbers = random_numbers(layout, 32, 64)
    packed = pack(numbers, layout)
    for n, k in [(0, 0), (17, 9), (31, 63), (5, 38)]:
        assert packed[n // 16, k // 4, n % 16, k % 4] == numbers[n, k]


@pytest.mark.parametrize(("bits", "block_size"), [(3, 32), (4, 16), (8, 256), (4, 0)])
def test_formats_that_no_kernel_knows(bits: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="no storage format"):
        BlockFormat(bits, block_size)
