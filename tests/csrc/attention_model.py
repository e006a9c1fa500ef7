"""One attention op as a whole ONNX model, random inputs for it, and what NumPy says comes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from cpmbee import native
from cpmbee.cache_types import CACHE_DTYPES, CacheType, layer_tensors
from cpmbee.export import functions

requires_native = pytest.mark.skipif(
    native.library_path() is None, reason="the native op library was not built (no C++ compiler, or CPMBEE_NATIVE=0)"
)

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention call."""

    batch: int = 2
    queries: int = 5
    keys: int = 12
    heads: int = 3
    dim_head: int = 16
    buckets: int = 24
    rows: int = 40  # of each cache
    cache: CacheType = "fp32"


def attention_model(shape: Shape, scale: float = 0.25, table: npt.NDArray[np.float32] | None = None) -> bytes:
    """A model that is one ``BucketedAttention``; with ``table`` given, the bias table is a constant of the model."""
    heads, dim_head = shape.heads, shape.dim_head
    number = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "int8": TensorProto.INT8}[shape.cache]
    caches: dict[str, tuple[int, list[Any]]] = {
        name: (TensorProto.FLOAT, ["rows", heads]) if "scales" in name else (number, ["rows", heads, dim_head])
        for name in layer_tensors(shape.cache)
    }
    inputs = {
        "qkv": (TensorProto.FLOAT, ["batch", "queries", 3 * heads * dim_head]),
        "relation": (TensorProto.INT16, ["batch", "queries", "keys"]),
        "table": (TensorProto.FLOAT, ["buckets", heads]),
        "slots": (TensorProto.INT32, ["batch", "keys"]),
        "new_slots": (TensorProto.INT32, ["batch", "queries"]),
        **caches,
    }
    outputs = {
        "context": (TensorProto.FLOAT, ["batch", "queries", heads * dim_head]),
        **{f"present_{name}": value for name, value in caches.items()},
    }
    node = helper.make_node(
        functions.ATTENTION, list(inputs), list(outputs), domain=functions.DOMAIN, num_heads=heads, scale=scale
    )
    return one_node_model(node, inputs, outputs, {} if table is None else {"table": table}, shape.cache)


def position_bias_model(heads: int, table: npt.NDArray[np.float32] | None = None) -> bytes:
    """A model that is one ``BucketedPositionBias``."""
    inputs = {
        "relation": (TensorProto.INT16, ["batch", "queries", "keys"]),
        "table": (TensorProto.FLOAT, ["buckets", heads]),
    }
    outputs = {"bias": (TensorProto.FLOAT, ["batch", heads, "queries", "keys"])}
    node = helper.make_node(functions.POSITION_BIAS, list(inputs), list(outputs), domain=functions.DOMAIN)
    return one_node_model(node, inputs, outputs, {} if table is None else {"table": table})


def one_node_model(
    node: onnx.NodeProto,
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, tuple[int, list[Any]]],
    constants: Arrays,
    cache: CacheType = "fp32",
) -> bytes:
    """The node, its functions and its constants as a checked, serialized model."""
    graph = helper.make_graph(
        [node],
        "one_op",
        [
            helper.make_tensor_value_info(n, *type_and_shape)
            for n, type_and_shape in inputs.items()
            if n not in constants
        ],
        [helper.make_tensor_value_info(name, *type_and_shape) for name, type_and_shape in outputs.items()],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(functions.DOMAIN, functions.DOMAIN_VERSION)]
    bodies = [functions.bucketed_position_bias(), functions.bucketed_attention(cache)]
    model = helper.make_model(graph, opset_imports=opsets, functions=bodies, ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    serialized: bytes = model.SerializeToString()
    return serialized


def open_session(model: bytes, *, use_native: bool, threads: int = 1) -> ort.InferenceSession:
    """A CPU session, with the native kernels or on the function bodies."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # refused inputs are the point of some tests
    if use_native:
        native.register(options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def random_inputs(rng: np.random.Generator, shape: Shape, masked: float = 0.3) -> Arrays:
    """Inputs with some blind queries, keys shared between sequences, and padding that reads and writes row 0."""
    batch, queries, keys = shape.batch, shape.queries, shape.keys
    relation = rng.integers(0, shape.buckets, (batch, queries, keys), dtype=np.int16)
    relation = np.sort(relation, axis=-1) if rng.random() < 0.5 else relation  # long stretches of one bucket
    relation[rng.random((batch, queries, keys)) < masked] = -1
    relation[rng.random((batch, queries)) < 0.1] = -1
    slots = rng.integers(0, shape.rows, (batch, keys), dtype=np.int32)
    slots[-1] = slots[0]
    new_slots = np.zeros((batch, queries), np.int32)
    fresh = rng.permutation(np.arange(1, shape.rows, dtype=np.int32))[: batch * queries]
    new_slots.reshape(-1)[: fresh.size] = fresh
    slots[:, -min(keys, queries) :] = new_slots[:, : min(keys, queries)]
    padding = slots == 0  # what row 0 holds after the call is nobody's business, so nobody may look
    relation[np.broadcast_to(padding[:, None, :], relation.shape)] = -1
    cache = (shape.rows, shape.heads, shape.dim_head)
    return {  # float16 and int8 caches hold what these numbers become
        "qkv": rng.standard_normal((batch, queries, 3 * shape.heads * shape.dim_head), dtype=np.float32),
        "relation": relation,
        "table": rng.standard_normal((shape.buckets, shape.heads), dtype=np.float32),
        "slots": slots,
        "new_slots": new_slots,
        **stored_cache("key", rng.standard_normal(cache, dtype=np.float32), shape.cache),
        **stored_cache("value", rng.standard_normal(cache, dtype=np.float32), shape.cache),
    }


def stored_cache(kind: str, numbers: npt.NDArray[np.float32], cache: CacheType) -> Arrays:
    """Rows (..., heads, dim_head) as a cache stores them."""
    if cache != "int8":
        return {f"{kind}_cache": numbers.astype(CACHE_DTYPES[cache])}
    scales = np.maximum(np.abs(numbers).max(axis=-1, initial=0), np.float32(1e-30)) / np.float32(127)
    return {f"{kind}_cache": np.rint(numbers / scales[..., None]).astype(np.int8), f"{kind}_scales": scales}


def read_cache(kind: str, arrays: Arrays, rows: npt.NDArray[np.int32] | int) -> npt.NDArray[np.float64]:
    """What rows of a cache stand for."""
    numbers = arrays[f"{kind}_cache"][rows].astype(np.float64)
    return numbers * arrays[f"{kind}_scales"][rows][..., None] if f"{kind}_scales" in arrays else numbers


def expected_attention(inputs: Arrays, shape: Shape, scale: float = 0.25) -> list[npt.NDArray[Any]]:
    """Context and caches, the context computed in float64."""
    batch, queries = inputs["new_slots"].shape
    parts = np.split(inputs["qkv"], 3, axis=-1)
    query, key, value = (part.reshape(batch, queries, shape.heads, shape.dim_head) for part in parts)
    caches = {name: inputs[name].copy() for name in layer_tensors(shape.cache)}
    for b in range(batch):
        new = {**stored_cache("key", key[b], shape.cache), **stored_cache("value", value[b], shape.cache)}
        for name, cache in caches.items():
            cache[inputs["new_slots"][b]] = new[name]
    keys, values = (read_cache(kind, caches, inputs["slots"]) for kind in ("key", "value"))  # (batch, keys, heads, .)
    scores = np.einsum("bqhd,bkhd->bhqk", query.astype(np.float64) * scale, keys)
    scores += expected_bias(inputs["relation"], inputs["table"])
    highest = scores.max(axis=-1, keepdims=True, initial=np.finfo(np.float64).min)
    weights = np.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    context = np.einsum("bhqk,bkhd->bqhd", weights, values).reshape(batch, queries, -1)
    return [context, *caches.values()]


def expected_bias(relation: npt.NDArray[np.int16], table: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The bias (batch, heads, queries, keys); -inf where the relation is -1."""
    padded = np.concatenate([table, np.full((1, table.shape[1]), -np.inf, np.float32)])
    return padded[relation].transpose(0, 3, 1, 2)
