"""Gate, norms, rotation and rows of a quantized embedding: native kernels and function bodies against NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper

from cpmbee import native
from cpmbee.export import functions, row_functions
from cpmbee.export.quantized_embedding import QUANTIZED_EMBEDDING, quantized_embedding
from tests.csrc.attention_model import open_session, requires_native
from tests.csrc.quantized_model import random_layer

Arrays = dict[str, npt.NDArray[Any]]
TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int32): TensorProto.INT32}
OTHER_TYPES = {np.dtype(np.uint8): TensorProto.UINT8, np.dtype(np.float16): TensorProto.FLOAT16}
WAYS = [pytest.param(isa, marks=requires_native) for isa in native.ISA_NAMES] + ["function"]


@pytest.fixture(autouse=True)
def _restore_isa() -> Iterator[None]:
    yield
    native.cap_isa(native.ISA_NAMES[-1])


def run(
    way: str, op: str, body: onnx.FunctionProto, inputs: Arrays, outputs: int = 1, threads: int = 1, **attributes: Any
) -> list[npt.NDArray[np.float32]]:
    """The op's outputs, from a native kernel or from its function body."""
    types = {**TYPES, **OTHER_TYPES}
    names = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, list(inputs), names, domain=functions.DOMAIN, **attributes)
    values = [helper.make_tensor_value_info(n, types[a.dtype], [None] * a.ndim) for n, a in inputs.items()]
    rank = next(iter(inputs.values())).ndim + (op == QUANTIZED_EMBEDDING)
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * rank) for n in names]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(functions.DOMAIN, functions.DOMAIN_VERSION)]
    bodies = [body] if op != row_functions.ADD_RMS_NORM else [body, row_functions.rms_norm()]
    graph = helper.make_graph([node], "one_op", values, results)
    model = helper.make_model(graph, opset_imports=opsets, functions=bodies, ir_version=9)
    onnx.checker.check_model(model)
    if way != "function":
        native.cap_isa(way)
    before = native.call_counts()[op]
    found = open_session(model.SerializeToString(), use_native=way != "function", threads=threads).run(None, inputs)
    assert native.call_counts()[op] - before == (way != "function")
    return [np.asarray(result) for result in found]


def gelu(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """With the complementary error function, which does not cancel on the negative side."""
    return np.array([v * 0.5 * math.erfc(-v / math.sqrt(2)) for v in x.astype(np.float64).ravel()]).reshape(x.shape)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(2, 3, 10), (1, 1, 5120), (70, 1042), (2, 0, 8), (4,)])
def test_gated_gelu(way: str, shape: tuple[int, ...]) -> None:
    both = 3 * np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    gate, value = np.split(both, 2, axis=-1)
    (found,) = run(way, "GatedGelu", row_functions.gated_gelu(), {"both": both})
    np.testing.assert_allclose(found, gelu(gate) * value, rtol=1e-6, atol=2e-6)


@requires_native
@pytest.mark.parametrize("isa", native.ISA_NAMES)
def test_gelu_is_as_exact_as_float32_allows(isa: str) -> None:
    gate = np.linspace(-14, 14, 200001, dtype=np.float32)
    (found,) = run(isa, "GatedGelu", row_functions.gated_gelu(), {"both": np.concatenate([gate, np.ones_like(gate)])})
    near = gate > -5
    np.testing.assert_allclose(found[near], gelu(gate)[near], rtol=1.5e-6)
    np.testing.assert_allclose(found[~near], gelu(gate)[~near], rtol=2e-5, atol=1e-37)
    special = np.array([-1e30, 1e30, np.nan, np.inf, 0, 1, 1, 1, 1, 1], np.float32)
    (found,) = run(isa, "GatedGelu", row_functions.gated_gelu(), {"both": special})
    np.testing.assert_array_equal(found[[0, 1, 2, 4]], np.array([0, 1e30, np.nan, 0], np.float32))
    assert not np.isfinite(found[3])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(2, 3, 10), (1, 1, 4096), (2, 40, 521), (2, 0, 8)])
def test_norms(way: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    stream, addend = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    weight = rng.standard_normal(shape[-1], dtype=np.float32)
    inputs = {"stream": stream, "addend": addend, "weight": weight}
    normed, total = run(way, "AddRMSNorm", row_functions.add_rms_norm(), inputs, outputs=2, epsilon=0.5)
    np.testing.assert_array_equal(total, stream + addend)
    (alone,) = run(way, "RMSNorm", row_functions.rms_norm(), {"x": total, "weight": weight}, epsilon=0.5)
    wide = total.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.5) * weight
    for found in (normed, alone):
        np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("pairs", [5, 64, 300])
def test_rotation(way: str, half: bool, pairs: int) -> None:
    rng = np.random.default_rng(3)
    subs = np.array([[0, 1, -1, 7], [100, 1000, 4094, 0]], np.int32)
    rows = rng.standard_normal((2, 4, 2 * pairs), dtype=np.float32)
    frequencies = (10000.0 ** (-np.arange(pairs) / pairs)).astype(np.float16 if half else np.float32)
    inputs = {"rows": rows, "subs": subs, "frequencies": frequencies.astype(np.float32)}
    options = {"distance_scale": 16.0, "half_phases": int(half)}
    (found,) = run(way, "SubscriptRotation", row_functions.subscript_rotation(half), inputs, **options)
    position = (subs * np.float32(16)).astype(frequencies.dtype)
    phase = (position[..., None] * frequencies).astype(frequencies.dtype).astype(np.float64)
    first, second = np.split(rows.astype(np.float64), 2, axis=-1)
    cos, sin = np.cos(phase), np.sin(phase)
    expected = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_array_equal(found[0, 0], rows[0, 0])


@pytest.mark.parametrize("way", [pytest.param("avx512", marks=requires_native), "function"])
@pytest.mark.parametrize(("bits", "block_size", "width"), [(4, 32, 70), (4, 64, 128), (8, 128, 129), (8, 32, 32)])
def test_rows_of_a_quantized_embedding(way: str, bits: int, block_size: int, width: int) -> None:
    layer = random_layer(np.random.default_rng(4), bits, block_size, width, 37)
    ids = np.array([[0, 36, 15], [16, 1, 36]], np.int32)
    inputs = {"ids": ids, "weight": layer.weight, "scales": layer.scales}
    (rows,) = run(way, QUANTIZED_EMBEDDING, quantized_embedding(bits), inputs, **layer.attributes)
    np.testing.assert_array_equal(rows, layer.matrix[ids].astype(np.float32))
    (empty,) = run(
        way, QUANTIZED_EMBEDDING, quantized_embedding(bits), {**inputs, "ids": ids[0, :0]}, **layer.attributes
    )
    assert empty.shape == (0, width)


@requires_native
def test_rows_do_not_depend_on_threads() -> None:
    rng = np.random.default_rng(5)
    stream, addend = (rng.standard_normal((1, 300, 1000), dtype=np.float32) for _ in range(2))
    inputs = {"stream": stream, "addend": addend, "weight": np.ones(1000, np.float32)}
    body = row_functions.add_rms_norm()
    one, two = (run("avx512", "AddRMSNorm", body, inputs, outputs=2, threads=n, epsilon=1e-6) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


@requires_native
def test_rows_of_no_width_take_no_time() -> None:
    many = np.zeros((2**40, 0), np.float32)
    none = np.zeros(0, np.float32)
    (gated,) = run("avx512", "GatedGelu", row_functions.gated_gelu(), {"both": many})
    (normed,) = run("avx512", "RMSNorm", row_functions.rms_norm(), {"x": many, "weight": none}, epsilon=1e-6)
    assert gated.shape == normed.shape == many.shape


@requires_native
@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("GatedGelu", {"both": ()}, {}),
        ("RMSNorm", {"x": (), "weight": (1,)}, {"epsilon": 1e-6}),
        ("RMSNorm", {"x": (3, 1), "weight": (1, 1)}, {"epsilon": 1e-6}),
        ("RMSNorm", {"x": (3, 2), "weight": (2,)}, {}),
        ("RMSNorm", {"x": (3, 2), "weight": (2,)}, {"epsilon": 1}),
        ("AddRMSNorm", {"stream": (2, 4), "addend": (4,), "weight": (4,)}, {"epsilon": 1e-6}),
        ("AddRMSNorm", {"stream": (), "addend": (), "weight": ()}, {"epsilon": 1e-6}),
        ("SubscriptRotation", {"rows": (), "subs": (2,), "frequencies": (0,)}, {"half_phases": 0}),
        ("SubscriptRotation", {"rows": (2, 4), "subs": (2,), "frequencies": (2, 1)}, {"half_phases": 0}),
        ("SubscriptRotation", {"rows": (2, 4), "subs": (3,), "frequencies": (2,)}, {"half_phases": 0}),
        ("SubscriptRotation", {"rows": (2, 4), "subs": (2,), "frequencies": (2,)}, {}),
    ],
)
def test_hostile_shapes_and_attributes_are_refused(
    op: str, inputs: dict[str, tuple[int, ...]], attributes: dict[str, Any]
) -> None:
    types = {name: np.int32 if name == "subs" else np.float32 for name in inputs}
    arrays: Arrays = {name: np.ones(shape, types[name]) for name, shape in inputs.items()}
    if op == "SubscriptRotation":
        attributes = {**attributes, "distance_scale": 1.0}
    outputs = 2 if op == "AddRMSNorm" else 1
    names = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, list(arrays), names, domain=functions.DOMAIN, **attributes)
    values = [helper.make_tensor_value_info(name, TYPES[array.dtype], None) for name, array in arrays.items()]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(functions.DOMAIN, functions.DOMAIN_VERSION)]
    graph = helper.make_graph([node], "hostile", values, results)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    with pytest.raises(Exception, match=f"{op}: |[Aa]ttribute"):
        open_session(model.SerializeToString(), use_native=True).run(None, arrays)


@requires_native
def test_wrong_inputs_are_refused() -> None:
    def ones(*shape: int) -> npt.NDArray[np.float32]:
        return np.ones(shape, np.float32)

    with pytest.raises(Exception, match=r"GatedGelu: both must have the shape \[...,2\*F\], not \[2,5\]"):
        run("avx512", "GatedGelu", row_functions.gated_gelu(), {"both": ones(2, 5)})
    with pytest.raises(Exception, match=r"RMSNorm: weight must have the shape \[D\] = \[6\], not \[5\]"):
        run("avx512", "RMSNorm", row_functions.rms_norm(), {"x": ones(2, 6), "weight": ones(5)}, epsilon=1e-6)
    inputs: Arrays = {"stream": ones(2, 6), "addend": ones(1, 6), "weight": ones(6)}
    with pytest.raises(Exception, match=r"AddRMSNorm: addend .* = \[2,6\], not \[1,6\]"):
        run("avx512", "AddRMSNorm", row_functions.add_rms_norm(), inputs, outputs=2, epsilon=1e-6)
    inputs = {"rows": ones(2, 6), "subs": np.ones(2, np.int32), "frequencies": ones(2)}
    body = row_functions.subscript_rotation(False)
    with pytest.raises(Exception, match=r"SubscriptRotation: rows .* = \[2,4\], not \[2,6\]"):
        run("avx512", "SubscriptRotation", body, inputs, distance_scale=1.0, half_phases=0)
    layer = random_layer(np.random.default_rng(6), 8, 32, 32, 16)
    for bad in (-1, 16):
        inputs = {"ids": np.array([3, bad], np.int32), "weight": layer.weight, "scales": layer.scales}
        with pytest.raises(Exception, match=rf"QuantizedEmbedding: ids\[1\] is {bad}, must be in 0\.\.15"):
            run("avx512", QUANTIZED_EMBEDDING, quantized_embedding(8), inputs, **layer.attributes)
