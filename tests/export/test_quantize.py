"""From weights to numbers and scales: the compiled search equals the readable one, and is never worse than rounding."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpmbee.export import parallel, plain_quantize
from cpmbee.export import quantize as quantize_module
from cpmbee.export.packing import BLOCK_SIZES, BlockFormat, dequantize, unpack
from cpmbee.export.quantize import LEVELS, Quantization, QuantizedMatrix

Array = npt.NDArray[Any]

every_format = pytest.mark.parametrize(("bits", "block_size"), [(b, s) for b in (4, 8) for s in BLOCK_SIZES])


def awkward_rows(columns: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """32 rows: ordinary, heavy-tailed, tiny, zero, one-sided, constant, and with a single large value."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((32, columns)).astype(np.float32)
    rows[1] = rng.standard_cauchy(columns)
    rows[2] *= 1e-7  # subnormal scales
    rows[3] *= 1e-12  # no scale at all
    rows[4] = 0
    rows[5] = abs(rows[5])
    rows[6] = -abs(rows[6])
    rows[7] = -0.37
    rows[8, ::7] = 0
    rows[9] *= 0
    rows[9, 5] = 3
    rows[10] = rng.integers(-8, 8, columns) * 0.5
    return rows


@every_format
@pytest.mark.parametrize("method", ["nearest", "search"])
def test_compiled_equals_plain(bits: int, block_size: int, method: str) -> None:
    compiled = pytest.importorskip("cpmbee._quantize")
    rows = awkward_rows(384)
    importance = np.random.default_rng(1).lognormal(0, 2, 384).astype(np.float32)
    importance[:block_size] = 0
    levels = np.array(LEVELS[bits][: None if method == "search" else 1], np.float32)
    arguments = (rows, importance, bits, block_size, levels, method == "search")
    ours, plain = plain_quantize.Quantized(*compiled.quantize(*arguments)), plain_quantize.quantize(*arguments)
    assert ours.packed.tobytes() == plain.packed.tobytes()
    assert ours.scales.tobytes() == plain.scales.tobytes()
    assert ours.scales.dtype == plain.scales.dtype
    np.testing.assert_allclose((ours.error, ours.power), (plain.error, plain.power), rtol=1e-12)


def test_compiled_widening_equals_plain() -> None:
    compiled = pytest.importorskip("cpmbee._quantize")
    halves = np.arange(1 << 16, dtype=np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16))].reshape(-1, 64)
    for factor in (1.0, 0.0123, 1.05**40):
        ours, plain = np.empty((2, *halves.shape), np.float32)
        compiled.widen(halves, factor, ours)
        plain_quantize.widen(halves, factor, plain)
        assert ours.tobytes() == plain.tobytes()
        assert plain.tobytes() == (halves.view(np.float16).astype(np.float32) * np.float32(factor)).tobytes()


@given(st.sampled_from([4, 8]), st.sampled_from(BLOCK_SIZES), st.integers(1, 48), st.integers(1, 300))
def test_compiled_expansion_equals_plain(bits: int, block_size: int, dim_out: int, dim_in: int) -> None:
    compiled = pytest.importorskip("cpmbee._quantize")
    layout, rng = BlockFormat(bits, block_size), np.random.default_rng(dim_in)
    packed = rng.integers(0, 256, layout.weight_shape(dim_out, dim_in), np.uint8)
    halves = rng.standard_normal(layout.scales_shape(dim_out, dim_in)).astype(np.float16).view(np.uint16)
    ours, plain = np.empty((2, dim_out, dim_in), np.float32)
    compiled.expand(packed, halves, bits, ours)
    plain_quantize.expand(packed, halves, bits, plain)
    np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize("start", [0, 5, 16, 37])
def test_rows_of_a_stored_matrix(start: int) -> None:
    layout, rng = BlockFormat(4, 32), np.random.default_rng(0)
    packed = rng.integers(0, 256, layout.weight_shape(80, 100), np.uint8)
    scales = rng.standard_normal(layout.scales_shape(80, 100)).astype(np.float16)
    whole = dequantize(packed, scales, 80, 100, layout)
    stored = quantize_module.StoredMatrix(packed, scales, layout, 100, factor=0.5)
    np.testing.assert_array_equal(stored.rows(start, 70), whole[start:70] * 2)


@pytest.mark.parametrize(
    "change",
    [{"bits": 5}, {"scales": np.zeros((1, 2, 16), "u2")}, {"scales": np.zeros((2, 3, 16), "u2")}]
    + [{"out": np.zeros(shape, "f4")} for shape in ((33, 64), (32, 65))],
)
def test_compiled_expansion_refuses_what_does_not_fit(change: dict[str, Any]) -> None:
    compiled = pytest.importorskip("cpmbee._quantize")
    stored = {"packed": np.zeros((2, 8, 16, 4), np.uint8), "scales": np.zeros((2, 2, 16), np.uint16)}
    with pytest.raises(ValueError, match="expand"):
        compiled.expand(**{**stored, "bits": 4, "out": np.zeros((32, 64), np.float32), **change})


@every_format
def test_search_is_never_worse_than_rounding(bits: int, block_size: int) -> None:
    rows = awkward_rows(256)
    nearest, search = (block_errors(rows, np.ones(256, np.float32), bits, block_size, m) for m in ("nearest", "search"))
    assert (search <= nearest * (1 + 1e-5)).all()
    if bits == 4:
        assert search[11:].sum() < 0.8 * nearest[11:].sum()  # the ordinary rows


@every_format
def test_calibrated_search_is_never_worse_on_what_matters(bits: int, block_size: int) -> None:
    rows = awkward_rows(256)
    importance = np.random.default_rng(3).lognormal(0, 2, 256).astype(np.float32)
    plain = plain_importance(rows, importance, bits, block_size, np.ones(256, np.float32))
    calibrated = plain_importance(rows, importance, bits, block_size, importance)
    nearest = block_errors(rows, importance, bits, block_size, "nearest")
    assert (calibrated <= nearest * (1 + 1e-5)).all()
    assert calibrated[11:].sum() < plain[11:].sum()


@every_format
def test_rounding_error_is_half_a_step(bits: int, block_size: int) -> None:
    rows = np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32)
    layout = BlockFormat(bits, block_size)
    made = run(rows, np.ones(256, np.float32), layout, "nearest")
    values = dequantize(made.packed, made.scales, 16, 256, layout)
    step = abs(rows.reshape(16, -1, block_size)).max(-1) / (layout.zero_point - 1)
    assert (abs(values - rows).reshape(16, -1, block_size).max(-1) <= 0.51 * step).all()


def test_values_on_a_grid_stay() -> None:
    rows = (np.random.default_rng(0).integers(-7, 8, (16, 64)) * np.float32(0.25)).astype(np.float32)
    rows[:, ::32] = -1.75
    for method in ("nearest", "search"):
        made = run(rows, np.ones(64, np.float32), BlockFormat(4, 32), method)
        np.testing.assert_array_equal(dequantize(made.packed, made.scales, 16, 64, BlockFormat(4, 32)), rows)
        assert made.error == 0


def test_beyond_fp16() -> None:
    rows = np.full((16, 32), 1e9, np.float32)
    for quantize in implementations():
        with pytest.raises(OverflowError, match="fp16 scales"):
            quantize(rows, np.ones(32, np.float32), 4, 32, np.array(LEVELS[4], np.float32), True)


@pytest.mark.parametrize(
    "change", [{"bits": 5}, {"block_size": 48}, {"rows": np.zeros((15, 64), np.float32)}, {"levels": np.zeros(0, "f4")}]
)
def test_compiled_refuses_what_does_not_fit(change: dict[str, Any]) -> None:
    compiled = pytest.importorskip("cpmbee._quantize")
    arguments = {
        "rows": np.zeros((16, 64), np.float32),
        "importance": np.ones(64, np.float32),
        "bits": 4,
        "block_size": 32,
        "levels": np.ones(1, np.float32),
        "refine": False,
    }
    with pytest.raises(ValueError, match="quantize"):
        compiled.quantize(**{**arguments, **change})


@given(
    st.sampled_from([4, 8]),
    st.sampled_from(BLOCK_SIZES),
    st.lists(st.integers(1, 50), min_size=1, max_size=3),
    st.integers(1, 200),
    st.sampled_from([np.float16, np.float32]),
)
def test_stacked_matrices(bits: int, block_size: int, dims_out: list[int], dim_in: int, dtype: Any) -> None:
    rng = np.random.default_rng(dim_in)
    tensors = [rng.standard_normal((rows, dim_in)).astype(dtype) for rows in dims_out]
    matrix = make_matrix(bits, block_size, tuple(dims_out), dim_in)
    packed = np.concatenate(list(matrix.weight.rows(tensors)))
    scales = np.concatenate(list(matrix.scales.rows([])))
    assert packed.shape == matrix.weight.shape
    assert scales.shape == matrix.scales.shape
    values = dequantize(packed, scales, matrix.dim_out, dim_in, matrix.layout)
    exact = np.concatenate(tensors).astype(np.float32) * np.float32(0.3)
    assert abs(values - exact).max() <= (0.2 if bits == 4 else 0.02) * abs(exact).max()
    numbers = unpack(packed, matrix.layout)
    assert (numbers[matrix.dim_out :] == matrix.layout.zero_point).all()
    assert (numbers[:, dim_in:] == matrix.layout.zero_point).all()


def test_panels_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [np.random.default_rng(0).standard_normal((100, 70)).astype(np.float16) for _ in range(3)]
    whole = make_matrix(4, 32, (100,) * 3, 70)
    expected = b"".join(piece.tobytes() for piece in whole.weight.rows(tensors))
    monkeypatch.setattr(quantize_module, "PANEL_BYTES", 1)
    panels = make_matrix(4, 32, (100,) * 3, 70)
    pieces = list(panels.weight.rows(tensors))
    assert len(pieces) == 19
    assert b"".join(piece.tobytes() for piece in pieces) == expected
    assert panels.error == pytest.approx(whole.error)


def test_memory_is_a_few_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_module, "PANEL_BYTES", 1 << 18)
    monkeypatch.setattr(parallel, "physical_cores", lambda: 2)
    tensor = np.zeros((20_000, 512), np.float16)
    tensor[:] = np.arange(512)
    matrix = make_matrix(4, 64, (20_000,), 512)
    tracemalloc.start()
    try:
        for _ in matrix.weight.rows([tensor]):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3e6  # 41 MB in fp32; its scales have 0.3 MB


def make_matrix(bits: int, block_size: int, dims_out: tuple[int, ...], dim_in: int) -> QuantizedMatrix:
    names = tuple(f"w{i}" for i in range(len(dims_out)))
    return Quantization(bits, 8, block_size).matrix("w", names, dim_in, dims_out, 0.3, bits)


def implementations() -> list[Callable[..., Any]]:
    return [plain_quantize.quantize, quantize_module.quantize]


def run(rows: Array, importance: Array, layout: BlockFormat, method: str) -> plain_quantize.Quantized:
    search = method == "search"
    levels = np.array(LEVELS[layout.bits][: None if search else 1], np.float32)
    return plain_quantize.quantize(rows, importance, layout.bits, layout.block_size, levels, search)


def block_errors(rows: Array, importance: Array, bits: int, block_size: int, method: str) -> Array:
    """Weighted squared error of each block."""
    layout = BlockFormat(bits, block_size)
    made = run(rows, importance, layout, method)
    return _errors(rows, importance, made, layout)


def plain_importance(rows: Array, importance: Array, bits: int, block_size: int, used: Array) -> Array:
    """The same, of a search that ``used`` other weights."""
    layout = BlockFormat(bits, block_size)
    return _errors(rows, importance, run(rows, used, layout, "search"), layout)


def _errors(rows: Array, importance: Array, made: plain_quantize.Quantized, layout: BlockFormat) -> Array:
    values = dequantize(made.packed, made.scales, *rows.shape, layout).astype(np.float64)
    squares = importance * np.square(values - rows)
    errors: Array = squares.reshape(len(rows), -1, layout.block_size).sum(-1)
    return errors
