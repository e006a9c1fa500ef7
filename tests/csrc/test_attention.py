"""BucketedAttention: the native kernels of every instruction set, the function body and NumPy agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmbee import native
from cpmbee.cache_types import CACHE_TYPES, CacheType, layer_tensors
from tests.csrc.attention_model import (
    Arrays,
    Shape,
    attention_model,
    expected_attention,
    open_session,
    random_inputs,
    read_cache,
    requires_native,
)

TOLERANCE = 2e-5
SHAPES = st.builds(
    Shape,
    batch=st.integers(1, 4),
    queries=st.one_of(st.integers(1, 7), st.integers(8, 70)),
    keys=st.integers(1, 300),
    heads=st.integers(1, 7),
    dim_head=st.one_of(st.sampled_from([16, 24, 40, 64, 128]), st.integers(1, 130)),
    buckets=st.integers(1, 600),
    rows=st.integers(2, 400),
    cache=st.sampled_from(CACHE_TYPES),
)


@pytest.fixture(autouse=True)
def _restore_isa() -> Iterator[None]:
    yield
    native.cap_isa(native.ISA_NAMES[-1])


def available_isas() -> list[str]:
    """The instruction sets that this machine has, by capping and asking what is active."""
    found = []
    for name in native.ISA_NAMES:
        native.cap_isa(name)
        if native.kernels()["BucketedAttention"] == name:
            found.append(name)
    return found


def assert_results(results: list[npt.NDArray[Any]], inputs: Arrays, shape: Shape, tolerance: float = TOLERANCE) -> None:
    context, *caches = expected_attention(inputs, shape)
    np.testing.assert_allclose(results[0], context, rtol=tolerance, atol=tolerance)
    for found, expected in zip(results[1:], caches, strict=True):
        np.testing.assert_array_equal(found[1:], expected[1:])  # row 0 is scratch


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1), masked=st.sampled_from([0.0, 0.3, 0.99]))
def test_function_body_equals_numpy(shape: Shape, seed: int, masked: float) -> None:
    inputs = random_inputs(np.random.default_rng(seed), shape, masked)
    session = open_session(attention_model(shape), use_native=False)
    assert_results(session.run(None, inputs), inputs, shape)


@requires_native
@settings(max_examples=80, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**32 - 1), masked=st.sampled_from([0.0, 0.3, 0.99]), constant=st.booleans())
def test_native_equals_numpy_on_every_instruction_set(shape: Shape, seed: int, masked: float, constant: bool) -> None:
    inputs = random_inputs(np.random.default_rng(seed), shape, masked)
    session = open_session(attention_model(shape, table=inputs["table"] if constant else None), use_native=True)
    fed = {name: array for name, array in inputs.items() if not (constant and name == "table")}
    for isa in available_isas():
        native.cap_isa(isa)
        before = native.call_counts()["BucketedAttention"]
        assert_results(session.run(None, fed), inputs, shape)
        assert native.call_counts()["BucketedAttention"] == before + 1


@requires_native
@pytest.mark.parametrize("cache", CACHE_TYPES)
@pytest.mark.parametrize("queries", [1, 8, 9, 400])
def test_threads_change_no_bit(queries: int, cache: CacheType) -> None:
    shape = Shape(batch=2, queries=queries, keys=500, heads=5, dim_head=40, rows=1200, cache=cache)
    inputs = random_inputs(np.random.default_rng(queries), shape)
    for isa in available_isas():
        native.cap_isa(isa)
        one, two = (open_session(attention_model(shape), use_native=True, threads=n).run(None, inputs) for n in (1, 2))
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)


@requires_native
@pytest.mark.parametrize("cache", CACHE_TYPES)
@pytest.mark.parametrize("queries", [1, 9])
def test_padding_and_neighbours_change_no_bit(queries: int, cache: CacheType) -> None:
    """A sequence gets the same context alone as beside another one in a batch that is padded to more keys."""
    shape = Shape(batch=2, queries=queries, keys=400, heads=3, dim_head=24, rows=500, cache=cache)
    inputs = random_inputs(np.random.default_rng(5), shape)
    inputs["relation"][0, :, 130:] = -1
    inputs["slots"][0, 130:] = 0
    batch = open_session(attention_model(shape), use_native=True).run(None, inputs)
    alone = {name: inputs[name][:1] for name in ("qkv", "new_slots")}
    alone |= {"relation": inputs["relation"][:1, :, :130], "slots": inputs["slots"][:1, :130]}
    alone |= {"table": inputs["table"], **dict(zip(layer_tensors(cache), batch[1:], strict=True))}
    single = open_session(attention_model(shape), use_native=True).run(None, alone)
    np.testing.assert_array_equal(single[0][0], batch[0][0])


@pytest.mark.parametrize("cache", CACHE_TYPES)
@pytest.mark.parametrize("use_native", [pytest.param(True, marks=requires_native), False])
def test_bound_caches_are_updated_in_place(use_native: bool, cache: CacheType) -> None:
    shape = Shape(cache=cache)
    session = open_session(attention_model(shape), use_native=use_native)
    rng = np.random.default_rng(3)
    inputs = random_inputs(rng, shape)
    caches = {name: ort.OrtValue.ortvalue_from_numpy(inputs[name].copy()) for name in layer_tensors(cache)}
    for _ in range(3):  # each step continues from what the last one wrote
        step = random_inputs(rng, shape) | {name: inputs[name] for name in caches}
        expected = expected_attention(step, shape)
        binding = session.io_binding()
        for name, array in step.items():
            if name in caches:
                binding.bind_ortvalue_input(name, caches[name])
                binding.bind_ortvalue_output(f"present_{name}", caches[name])
            else:
                binding.bind_cpu_input(name, array)
        binding.bind_output("context")
        session.run_with_iobinding(binding)
        outputs = dict(zip([o.name for o in session.get_outputs()], binding.get_outputs(), strict=False))
        context = next(v.numpy() for v in outputs.values() if v.shape() == list(expected[0].shape))
        np.testing.assert_allclose(context, expected[0], rtol=TOLERANCE, atol=TOLERANCE)
        inputs |= dict(zip(caches, expected[1:], strict=True))
        for name, value in caches.items():
            np.testing.assert_array_equal(value.numpy()[1:], inputs[name][1:])
            inputs[name][0] = value.numpy()[0]  # scratch goes on as it is


@pytest.mark.parametrize("use_native", [pytest.param(True, marks=requires_native), False])
def test_blind_queries_give_zeros(use_native: bool) -> None:
    for queries in (1, 6):
        shape = Shape(queries=queries, keys=70, rows=80)
        inputs = random_inputs(np.random.default_rng(0), shape, masked=0.0)
        inputs["relation"][:, 0] = -1
        context = open_session(attention_model(shape), use_native=use_native).run(["context"], inputs)[0]
        np.testing.assert_array_equal(context[:, 0], 0)
        assert np.isfinite(context).all()


@requires_native
@pytest.mark.parametrize("queries", [1, 8])
def test_large_scores_neither_overflow_nor_lose_the_largest(queries: int) -> None:
    shape = Shape(batch=1, queries=queries, keys=100, rows=120)
    inputs = random_inputs(np.random.default_rng(1), shape, masked=0.0)
    inputs["table"] *= np.float32(1e4)
    session = open_session(attention_model(shape), use_native=True)
    for isa in available_isas():
        native.cap_isa(isa)
        results = session.run(None, inputs)
        assert_results(results, inputs, shape, tolerance=5e-3)  # float32 scores of 1e4 are 1e-3 apart


@pytest.mark.parametrize("use_native", [pytest.param(True, marks=requires_native), False])
@pytest.mark.parametrize("cache", ["fp16", "int8"])
def test_numbers_that_the_cache_cannot_hold(cache: CacheType, use_native: bool) -> None:
    """Too large ones saturate, zeros and tiny ones do not divide by zero, halves are rounded to even."""
    values = np.array([[1e6, -3e5, 0, 1e-9], [0, 0, 0, 0], [1e-38, -1e-38, 0, 0], [127, 0.5, 1.5, -2.5]], np.float32)
    shape = Shape(batch=1, queries=1, keys=1, heads=4, dim_head=4, rows=2, buckets=1, cache=cache)
    inputs = random_inputs(np.random.default_rng(0), shape)
    inputs |= {"slots": np.ones((1, 1), np.int32), "new_slots": np.ones((1, 1), np.int32)}
    inputs["relation"][:] = 0
    inputs["qkv"][0, 0] = np.concatenate([np.zeros(16, np.float32), values.ravel(), values.ravel()])
    expected = np.clip(values, -65504, 65504).astype(np.float16)
    if cache == "int8":
        expected = np.array([[127, -38, 0, 0], [0] * 4, [0] * 4, [127, 0, 2, -2]], np.int8)
    session = open_session(attention_model(shape), use_native=use_native)
    for isa in available_isas() if use_native else native.ISA_NAMES[:1]:
        native.cap_isa(isa)
        context, *caches = session.run(None, inputs)
        np.testing.assert_array_equal(caches[0][1], expected)
        np.testing.assert_array_equal(caches[1][1], expected)
        read = read_cache("value", dict(zip(layer_tensors(cache), caches, strict=True)), 1)
        np.testing.assert_allclose(context.ravel(), read.ravel(), rtol=1e-6)
