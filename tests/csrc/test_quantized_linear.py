"""QuantizedLinear: native kernels and function body against NumPy, and against each other to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from cpmbee import native
from tests.csrc.attention_model import open_session, requires_native
from tests.csrc.quantized_model import (
    exact,
    linear_model,
    quantized_product,
    random_layer,
    rounding_bound,
)

SHAPES = [  # (in_features, out_features)
    (1, 1),
    (70, 17),
    (129, 100),
    (320, 48),
    (1100, 250),
    (5300, 20),
]
ROWS = [1, 2, 3, 5, 8, 9, 16, 37]
every_format = pytest.mark.parametrize(("bits", "block_size"), [(b, s) for b in (4, 8) for s in (32, 64, 128)])


@pytest.fixture(autouse=True)
def _restore_isa() -> Iterator[None]:
    yield
    native.cap_isa(native.ISA_NAMES[-1])


def run(session: Any, x: np.ndarray[Any, Any], **others: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(session.run(None, {"x": x, **others})[0])


@requires_native
@every_format
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES)
def test_native_is_the_definition_whatever_the_machine(
    bits: int, block_size: int, in_features: int, out_features: int
) -> None:
    rng = np.random.default_rng(in_features)
    layer = random_layer(rng, bits, block_size, in_features, out_features)
    model = linear_model(layer)
    one, two = (open_session(model, use_native=True, threads=threads) for threads in (1, 2))
    for rows in ROWS:
        x = rng.standard_normal((rows, in_features), dtype=np.float32)
        native.cap_isa("scalar")
        expected = run(one, x)
        assert expected.dtype == np.float32
        np.testing.assert_allclose(expected, quantized_product(layer, x), rtol=1e-4, atol=1e-5 * np.abs(expected).max())
        assert (np.abs(expected - exact(layer, x)) <= rounding_bound(layer, x)).all()
        for isa in native.ISA_NAMES:
            native.cap_isa(isa)
            for session in (one, two):
                np.testing.assert_array_equal(run(session, x), expected)


@every_format
@pytest.mark.parametrize(("in_features", "out_features"), SHAPES[1:])
def test_the_function_body_rounds_no_worse(bits: int, block_size: int, in_features: int, out_features: int) -> None:
    rng = np.random.default_rng(1)
    layer = random_layer(rng, bits, block_size, in_features, out_features)
    session = open_session(linear_model(layer), use_native=False)
    for rows in (1, 7, 40):
        x = rng.standard_normal((rows, in_features), dtype=np.float32)
        assert (np.abs(run(session, x) - exact(layer, x)) <= rounding_bound(layer, x)).all()


@requires_native
def test_rows_do_not_depend_on_their_company() -> None:
    rng = np.random.default_rng(2)
    layer = random_layer(rng, 4, 64, 200, 90)
    session = open_session(linear_model(layer), use_native=True)
    x = rng.standard_normal((70, 200), dtype=np.float32)
    together = run(session, x)
    for count in (1, 3, 8, 16):
        np.testing.assert_array_equal(run(session, x[:count]), together[:count])


@requires_native
def test_any_rank_and_no_rows() -> None:
    rng = np.random.default_rng(3)
    layer = random_layer(rng, 8, 32, 48, 20)
    x = rng.standard_normal((2, 3, 48), dtype=np.float32)
    matrix = run(open_session(linear_model(layer), use_native=True), x.reshape(6, 48))
    session = open_session(linear_model(layer, rank=3), use_native=True)
    np.testing.assert_array_equal(run(session, x), matrix.reshape(2, 3, 20))
    assert run(session, x[:, :0]).shape == (2, 0, 20)
    np.testing.assert_array_equal(run(open_session(linear_model(layer, rank=1), use_native=True), x[0, 0]), matrix[0])


@requires_native
@pytest.mark.parametrize("isa", native.ISA_NAMES)
def test_unusual_activations(isa: str) -> None:
    native.cap_isa(isa)
    rng = np.random.default_rng(4)
    layer = random_layer(rng, 4, 32, 96, 16)
    session = open_session(linear_model(layer), use_native=True)
    x = np.zeros((4, 96), np.float32)
    x[1, :32] = 1e-40  # subnormal: as good as zero
    x[2, 5] = 3e38  # large, and the exact product is finite
    x[3, 40] = np.nan
    y = run(session, x)
    assert (y[:2] == 0).all()
    np.testing.assert_allclose(y[2], exact(layer, x[2]), rtol=1e-5)
    assert np.isnan(y[3]).all()
    x[3, 40] = np.inf
    assert np.isnan(run(session, x)[3]).all()


@requires_native
def test_the_native_kernel_is_what_ran() -> None:
    layer = random_layer(np.random.default_rng(5), 4, 32, 64, 16)
    x = np.ones((1, 64), np.float32)
    before = native.call_counts()["QuantizedLinear"]
    run(open_session(linear_model(layer), use_native=False), x)
    assert native.call_counts()["QuantizedLinear"] == before
    run(open_session(linear_model(layer), use_native=True), x)
    assert native.call_counts()["QuantizedLinear"] == before + 1


@requires_native
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"bits": 5}, "bits must be 4 or 8, not 5"),
        ({"bits": 8}, r"weight must have the shape \[N/16,K/4,16,4\] = \[2,24,16,4\], not \[2,12,16,4\]"),
        ({"block_size": 48}, "block_size must be 32, 64 or 128, not 48"),
        ({"block_size": 128}, r"weight must have the shape \[N/16,K/8,16,4\] = \[2,16,16,4\]"),
        ({"in_features": 0}, r"in_features must be in 1\.\.16777216, not 0"),
        ({"in_features": 97}, "weight must have the shape"),
        ({"out_features": 33}, r"\[3,12,16,4\], not \[2,12,16,4\]"),
        ({"out_features": 1 << 62}, "out_features must be in"),
    ],
)
def test_a_wrong_node_is_refused_at_load(attributes: dict[str, int], message: str) -> None:
    layer = random_layer(np.random.default_rng(6), 4, 32, 96, 32)
    with pytest.raises(Exception, match=f"QuantizedLinear: .*{message}"):
        open_session(linear_model(layer, **attributes), use_native=True)


@requires_native
def test_wrong_inputs_are_refused() -> None:
    layer = random_layer(np.random.default_rng(7), 8, 64, 128, 32)
    session = open_session(linear_model(layer, constants=False), use_native=True)
    x = np.ones((2, 128), np.float32)
    good: dict[str, np.ndarray[Any, Any]] = {"weight": layer.weight, "scales": layer.scales}
    np.testing.assert_allclose(run(session, x, **good), exact(layer, x), rtol=1e-4)
    with pytest.raises(Exception, match=r"QuantizedLinear: x must have the shape \[...,128\], not \[2,127\]"):
        run(session, x[:, 1:], **good)
    with pytest.raises(Exception, match=r"weight must have the shape .* = \[2,32,16,4\], not \[1,32,16,4\]"):
        run(session, x, weight=layer.weight[:1], scales=layer.scales)
    with pytest.raises(Exception, match=r"scales must have the shape .* = \[2,2,16\], not \[2,1,16\]"):
        run(session, x, weight=layer.weight, scales=layer.scales[:, :1])
