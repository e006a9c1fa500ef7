"""One attention layer: native kernels on every type of cache, function body, and what ONNX Runtime itself offers.

Time and peak memory: ``python -m cpmbee.bench.attention``. Every measurement has a process of its own, and the
implementations take turns, since what else the machine does changes faster than a table is filled; the processor
time, unlike the time, hardly depends on it. The two peers get less to do than our op: keys and values already lie
side by side and in order, and no position bias is added.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from cpmbee import native
from cpmbee.bench.environment import ROOT, write_result
from cpmbee.cache_types import CACHE_DTYPES, CacheType, layer_tensors
from cpmbee.config import ModelConfig
from cpmbee.distance import signed_distance_buckets
from cpmbee.export import functions
from cpmbee.export.model_proto import NUMBERS
from cpmbee.onnxruntime_import import import_onnxruntime

if TYPE_CHECKING:
    import onnxruntime as ort
else:
    ort = import_onnxruntime()

CACHES: dict[str, CacheType] = {"native": "fp32", "native, fp16 cache": "fp16", "native, int8 cache": "int8"}
IMPLEMENTATIONS = (*CACHES, "function body", "MatMul + Softmax", "MultiHeadAttention")
SCORE_TENSORS = {"function body": 7.0, "MatMul + Softmax": 1.2}  # of (heads, queries, keys), alive at one time
CONFIG = ModelConfig(vocab_size=2, hidden_size=2, num_attention_heads=1, dim_head=1, dim_ff=1, num_hidden_layers=1)
MIN_SECONDS = 0.7  # of repetitions in each process


@dataclass(frozen=True)
class Case:
    """One call: ``queries`` new tokens that attend to ``keys``, the new ones among them."""

    name: str
    heads: int
    dim_head: int
    queries: int
    keys: int


LAYERS = (("2b-shaped", 32, 64), ("small", 4, 32))
CASES = tuple(
    Case(f"{layer}, {work}", heads, dim_head, queries, keys)
    for layer, heads, dim_head in LAYERS
    for work, queries, keys in (
        ("prefill 512", 512, 512),
        ("prefill 2048", 2048, 2048),
        ("prefill 4096", 4096, 4096),
        ("decode at 512", 1, 512),
        ("decode at 4096", 1, 4096),
    )
)

Arrays = dict[str, npt.NDArray[Any]]


def main() -> None:
    """Measure everything, print a Markdown table and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each session")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each measurement; the fastest call counts")
    parser.add_argument("--no-write", action="store_true", help="do not keep the result")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # (implementation, case), in this process
    arguments = parser.parse_args()
    if arguments.one:
        case = next(case for case in CASES if case.name == arguments.one[1])
        print(json.dumps(measure(arguments.one[0], case, arguments.threads)))
        return
    print("| work | " + " | ".join(IMPLEMENTATIONS) + " |\n|---|" + "---:|" * len(IMPLEMENTATIONS))
    load_before = os.getloadavg()[0]  # more than a little, and the times of several threads say nothing
    results = []
    for case in CASES:
        row = measure_in_turns(case, arguments.threads, arguments.rounds)
        results.append({**asdict(case), "measured": row})
        print(f"| {case.name} | " + " | ".join(cell(result) for result in row.values()) + " |", flush=True)
    print(
        f"\nFastest call (processor time, mean), rate (GFLOP/s in prefill, GB/s in decode), peak "
        f"memory. {arguments.threads} threads; load {load_before:.1f} before."
    )
    if not arguments.no_write:
        kernel = native.kernels()["BucketedAttention"]
        facts = {"threads": arguments.threads, "kernel": kernel, "rounds": arguments.rounds}
        facts["load"] = [load_before, os.getloadavg()[0]]  # before and after; our own threads are part of the latter
        write_result("attention", {**facts, "cases": results})


def measure_in_turns(case: Case, threads: int, rounds: int) -> dict[str, dict[str, Any] | None]:
    """Every implementation once a round: its fastest round, with its most frugal round's processor time.

    None for an implementation that needs more than half of the memory that is free.
    """
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(rounds):
        for name, results in measured.items():
            scores = case.heads * case.queries * case.keys * np.dtype(np.float32).itemsize
            if scores * SCORE_TENSORS.get(name, 0) < memory_available() / 2:
                results.append(measure_in_process(name, case, threads))
    best: dict[str, dict[str, Any] | None] = dict.fromkeys(IMPLEMENTATIONS)
    for name, results in measured.items():
        if results:
            fastest = min(results, key=lambda result: float(result["milliseconds"]))
            best[name] = {**fastest, "cpu_milliseconds": min(result["cpu_milliseconds"] for result in results)}
    return best


def cell(result: dict[str, Any] | None) -> str:
    """One measurement as text."""
    if result is None:
        return "not run: too little memory"
    times = f"{result['milliseconds']:.3g} ms ({result['cpu_milliseconds']:.3g})"
    return f"{times}, {result['rate']:.3g} {result['unit']}, {result['peak_mib']:.0f} MiB"


def measure_in_process(implementation: str, case: Case, threads: int) -> dict[str, Any]:
    """Run `measure` in a fresh process."""
    command = [sys.executable, "-m", "cpmbee.bench.attention", "--threads", str(threads), "--one"]
    process = subprocess.run(
        [*command, implementation, case.name], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    measured: dict[str, Any] = json.loads(process.stdout)
    return measured


def measure(implementation: str, case: Case, threads: int) -> dict[str, Any]:
    """Fastest and median time of one call, and how far memory grows beyond the inputs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    cache = CACHES.get(implementation, "fp32")
    if implementation in CACHES:
        native.register(options)
    ours = implementation in CACHES or implementation == "function body"
    model = our_model(case, cache) if ours else peer_model(implementation, case)
    inputs = our_inputs(case, cache) if ours else peer_inputs(implementation, case)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in inputs.items():
        value = ort.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(name, value)
        if name in layer_tensors(cache):
            binding.bind_ortvalue_output(f"present_{name}", value)
    binding.bind_output("context")

    before = forget_peak()
    session.run_with_iobinding(binding)
    times: list[float] = []
    cpu_start = time.process_time()
    while sum(times) < MIN_SECONDS or len(times) < 3:
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        times.append(time.perf_counter() - start)
    # A mean: the system books a running thread's time only at its next tick, so single short calls look too cheap.
    cpu_time = (time.process_time() - cpu_start) / len(times)
    peak = resident("VmHWM") - before  # over all calls: the runtime's arena still grows in the second one
    if implementation in CACHES:
        assert native.call_counts()["BucketedAttention"] == len(times) + 1
    prefill = case.queries > 1
    read = sum(array.nbytes for name, array in inputs.items() if name in layer_tensors(cache)) if ours else 0
    numbers = case.heads * case.dim_head * case.keys
    work = 4 * numbers * case.queries if prefill else read or 2 * numbers * np.dtype(np.float32).itemsize
    fastest = min(times)
    return {
        "milliseconds": fastest * 1e3,
        "cpu_milliseconds": cpu_time * 1e3,
        "median_milliseconds": float(np.median(times)) * 1e3,
        "rate": work / fastest * 1e-9,
        "unit": "GFLOP/s" if prefill else "GB/s",
        "peak_mib": peak / 2**20,
    }


def our_model(case: Case, cache: CacheType) -> bytes:
    """One ``BucketedAttention`` whose table is a constant, as in an exported model."""
    caches: dict[str, tuple[int, list[Any]]] = {
        name: (TensorProto.FLOAT, ["rows", case.heads])
        if name.endswith("_scales")
        else (NUMBERS[cache], ["rows", case.heads, case.dim_head])
        for name in layer_tensors(cache)
    }
    inputs: dict[str, tuple[int, list[Any]]] = {
        "qkv": (TensorProto.FLOAT, ["batch", "queries", 3 * case.heads * case.dim_head]),
        "relation": (TensorProto.INT16, ["batch", "queries", "keys"]),
        "slots": (TensorProto.INT32, ["batch", "keys"]),
        "new_slots": (TensorProto.INT32, ["batch", "queries"]),
        **caches,
    }
    outputs: dict[str, tuple[int, list[Any]]] = {
        "context": (TensorProto.FLOAT, ["batch", "queries", case.heads * case.dim_head]),
        **{f"present_{name}": described for name, described in caches.items()},
    }
    names = list(inputs)
    names.insert(2, "table")
    attributes = {"num_heads": case.heads, "scale": case.dim_head**-0.5}
    node = helper.make_node(functions.ATTENTION, names, list(outputs), domain=functions.DOMAIN, **attributes)
    table = np.random.default_rng(0).standard_normal((CONFIG.num_bias_rows, case.heads), dtype=np.float32)
    return make_model([node], inputs, outputs, {"table": table}, cache)


def our_inputs(case: Case, cache: CacheType) -> Arrays:
    """One segment of text; its rows are scattered over the cache as after some use."""
    rng = np.random.default_rng(1)
    half = CONFIG.position_bias_max_distance
    distances = np.arange(case.keys)[None, :] - np.arange(case.keys - case.queries, case.keys)[:, None]
    slots = (1 + rng.permutation(case.keys)).astype(np.int32)[None]
    rows = (case.keys + 1, case.heads, case.dim_head)
    caches: Arrays = {}
    for name in layer_tensors(cache):
        if name.endswith("_scales"):
            caches[name] = np.full(rows[:2], 0.02, np.float32)
        elif cache == "int8":
            caches[name] = rng.integers(-127, 128, rows, dtype=np.int8)
        else:
            caches[name] = rng.standard_normal(rows, dtype=np.float32).astype(CACHE_DTYPES[cache])
    return {
        "qkv": rng.standard_normal((1, case.queries, 3 * case.heads * case.dim_head), dtype=np.float32),
        "relation": signed_distance_buckets(CONFIG)[np.clip(distances, -half, half) + half][None],
        "slots": slots,
        "new_slots": slots[:, case.keys - case.queries :].copy(),
        **caches,
    }


def peer_model(implementation: str, case: Case) -> bytes:
    """Attention without bias and cache, out of ONNX Runtime's own operators."""
    if implementation == "MultiHeadAttention":  # (batch, tokens, heads * dim_head)
        width = case.heads * case.dim_head
        shapes = {"q": [1, "queries", width], "k": [1, "keys", width], "v": [1, "keys", width]}
        context = [1, "queries", width]
        nodes = [
            helper.make_node(implementation, ["q", "k", "v"], ["context"], domain="com.microsoft", num_heads=case.heads)
        ]
    else:
        heads, dim_head = case.heads, case.dim_head
        shapes = {
            "q": [1, heads, "queries", dim_head],
            "k": [1, heads, dim_head, "keys"],
            "v": [1, heads, "keys", dim_head],
        }
        context = [1, heads, "queries", dim_head]
        nodes = [
            helper.make_node("MatMul", ["q", "k"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
            helper.make_node("MatMul", ["weights", "v"], ["context"]),
        ]
    inputs = {name: (TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    return make_model(nodes, inputs, {"context": (TensorProto.FLOAT, context)}, {})


def peer_inputs(implementation: str, case: Case) -> Arrays:
    """Random queries, keys and values in the layout that the peer likes best."""
    rng = np.random.default_rng(1)
    heads, dim_head, queries, keys = case.heads, case.dim_head, case.queries, case.keys
    shapes: list[tuple[int, ...]]
    if implementation == "MultiHeadAttention":
        shapes = [(1, n, heads * dim_head) for n in (queries, keys, keys)]
    else:
        shapes = [(1, heads, queries, dim_head), (1, heads, dim_head, keys), (1, heads, keys, dim_head)]
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in zip("qkv", shapes, strict=True)}


def make_model(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, Sequence[Any]]],
    outputs: Mapping[str, tuple[int, Sequence[Any]]],
    constants: Arrays,
    cache: CacheType = "fp32",
) -> bytes:
    """A serialized model with our functions in it."""
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(name, *type_and_shape) for name, type_and_shape in inputs.items()],
        [helper.make_tensor_value_info(name, *type_and_shape) for name, type_and_shape in outputs.items()],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    domains = (("", 18), (functions.DOMAIN, functions.DOMAIN_VERSION), ("com.microsoft", 1))
    opsets = [helper.make_opsetid(domain, version) for domain, version in domains]
    bodies = [functions.bucketed_position_bias(), functions.bucketed_attention(cache)]
    model = helper.make_model(graph, opset_imports=opsets, functions=bodies, ir_version=9)
    serialized: bytes = model.SerializeToString()
    return serialized


def forget_peak() -> int:
    """Resident bytes now, which the peak is counted from."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident("VmRSS")


def resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process in bytes."""
    return read_bytes("/proc/self/status", field)


def memory_available() -> int:
    """Bytes that a new process may take without harm to others."""
    return read_bytes("/proc/meminfo", "MemAvailable")


def read_bytes(path: str, field: str) -> int:
    """The field of a ``/proc`` file that counts in kilobytes."""
    lines = Path(path).read_text(encoding="ascii").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{field}:"))) * 1024


if __name__ == "__main__":
    main()
