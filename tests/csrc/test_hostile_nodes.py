"""Nodes that no exporter writes: outputs left out, empty tensors of huge shapes, and numbers that are none."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import TensorProto, helper

from cpmbee import native
from cpmbee.cache_types import layer_tensors
from cpmbee.export import functions
from tests.csrc.attention_model import (
    Shape,
    attention_model,
    expected_attention,
    open_session,
    position_bias_model,
    random_inputs,
    requires_native,
)

pytestmark = requires_native
ROOT = Path(__file__).resolve().parents[2]
NUMBERS = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.int16): TensorProto.INT16,
    np.dtype(np.int32): TensorProto.INT32,
}


@pytest.fixture(autouse=True)
def _restore_isa() -> Iterator[None]:
    yield
    native.cap_isa(native.ISA_NAMES[-1])


def node_model(
    op: str, inputs: dict[str, npt.NDArray[Any]], outputs: list[str], left_out: str, **attributes: Any
) -> bytes:
    """One node whose input or output ``left_out`` has no name, over inputs of any shape."""
    node = helper.make_node(
        op,
        ["" if name == left_out else name for name in inputs],
        ["" if name == left_out else name for name in outputs],
        domain=functions.DOMAIN,
        **attributes,
    )
    values = [helper.make_tensor_value_info(n, NUMBERS[a.dtype], None) for n, a in inputs.items() if n != left_out]
    kept = [name for name in outputs if name != left_out]
    kinds = [NUMBERS[inputs[n.removeprefix("present_")].dtype] if "present" in n else TensorProto.FLOAT for n in kept]
    results = [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(kept, kinds, strict=True)]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(functions.DOMAIN, functions.DOMAIN_VERSION)]
    model = helper.make_model(helper.make_graph([node], "hostile", values, results), opset_imports=opsets, ir_version=9)
    return bytes(model.SerializeToString())


def int8_case() -> tuple[dict[str, npt.NDArray[Any]], list[str]]:
    shape = Shape(cache="int8")
    outputs = ["context", *(f"present_{name}" for name in layer_tensors("int8"))]
    inputs = random_inputs(np.random.default_rng(0), shape)
    names = ("qkv", "relation", "table", "slots", "new_slots", *layer_tensors("int8"))
    return {name: inputs[name] for name in names}, outputs


def run_attention_without(left_out: str) -> None:
    """Ends the process with 0 where the runtime or the op refuses in one line."""
    inputs, outputs = int8_case()
    model = node_model(functions.ATTENTION, inputs, outputs, left_out, num_heads=3, scale=0.25)
    fed = {name: array for name, array in inputs.items() if name != left_out}
    try:
        open_session(model, use_native=True).run(None, fed)
    except Exception as error:
        print(str(error))
        raise SystemExit(0) from None
    raise SystemExit(1)


@pytest.mark.parametrize(
    "left_out",
    ["qkv", "table", "slots", "key_cache", "key_scales", "value_scales", "context", "present_value_cache",
     "present_key_scales", "present_value_scales"],
)  # fmt: skip
def test_a_node_that_leaves_something_out_is_refused(left_out: str) -> None:
    code = f"from tests.csrc.test_hostile_nodes import run_attention_without as run; run({left_out!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-500:])


@pytest.mark.parametrize("isa", native.ISA_NAMES)
@pytest.mark.parametrize("cache", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("queries", [2, 20])
def test_a_call_with_nan_leaves_nothing_behind(isa: str, cache: Any, queries: int) -> None:
    """Few keys fill a tile in part; what an earlier call of this thread left in the rest must not be seen."""
    native.cap_isa(isa)
    shape = Shape(batch=1, queries=queries, keys=128, cache=cache, rows=200)
    session = open_session(attention_model(shape), use_native=True)
    inputs = random_inputs(np.random.default_rng(1), shape, masked=0)
    broken = {**inputs, "qkv": np.full_like(inputs["qkv"], np.nan)}
    few = Shape(batch=1, queries=queries, keys=21, cache=cache, rows=200)
    good = random_inputs(np.random.default_rng(2), few)
    session.run(["context"], broken)
    np.testing.assert_allclose(session.run(["context"], good)[0], expected_attention(good, few)[0], atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((0, 3, 2**40), "last dimension"), ((4, 3, 0), "last dimension"), ((0, 2**40, 4), r"\[\?,3,\?\]")],
)
def test_caches_of_impossible_shapes_are_refused(shape: tuple[int, ...], message: str) -> None:
    outputs = ["context", "present_key_cache", "present_value_cache"]
    cache = np.zeros(shape, np.float32)
    inputs = {
        "qkv": np.zeros((1, 0, 9 * (shape[2] % 2**30)), np.float32),
        "relation": np.zeros((1, 0, 0), np.int16),
        "table": np.zeros((0, 3), np.float32),
        "slots": np.zeros((1, 0), np.int32),
        "new_slots": np.zeros((1, 0), np.int32),
        "key_cache": cache,
        "value_cache": cache,
    }
    model = node_model(functions.ATTENTION, inputs, outputs, "", num_heads=3, scale=1.0)
    with pytest.raises(Exception, match=f"BucketedAttention: .*{message}"):
        open_session(model, use_native=True).run(None, inputs)


def test_rows_without_keys_take_no_time() -> None:
    inputs = {"relation": np.zeros((1, 2**40, 0), np.int16), "table": np.zeros((4, 2), np.float32)}
    (bias,) = open_session(position_bias_model(heads=2), use_native=True).run(None, inputs)
    assert bias.shape == (1, 2, 2**40, 0)


@pytest.mark.parametrize("index", [-1, -(2**31), 1000, 2**31 - 1])
def test_ops_that_there_are_not_have_no_name(index: int) -> None:
    path = native.library_path()
    assert path is not None
    library = ctypes.CDLL(str(path))
    library.cpmbee_op_name.restype = library.cpmbee_op_kernel.restype = ctypes.c_char_p
    library.cpmbee_op_calls.restype = ctypes.c_uint64
    assert library.cpmbee_op_name(index) is None
    assert library.cpmbee_op_kernel(index) is None
    assert library.cpmbee_op_calls(index) == 0
    assert library.cpmbee_cap_isa(None) == 0
