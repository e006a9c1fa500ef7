"""One quantized product: ours beside ONNX Runtime's ``MatMulNBits`` and ``DynamicQuantizeMatMul``, and the memory.

    python -m cpmbee.bench.quantized_linear

A model is a chain of products, 2048 to 5120 features and back: 32 different matrices of 10.5 million weights, more than
any cache holds, so that few rows show how fast weights are read. ``MatMulNBits`` gets the same model and weights: it is
the body of our op, which runs where the native kernels are not registered. ``DynamicQuantizeMatMul`` has one scale for
each output and one for all activations: another quality, the same work. Contenders take turns in one process, on the
same threads; the median counts. Bytes of weights include their scales. The read bandwidth is that of NumPy's reductions
(``benchmarks/bandwidth.py``), measured before and after, on as many threads. On a machine that others use, run it with
a higher priority than theirs: a thread that waits for a core makes all the others wait.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cpmbee import native
from cpmbee.bench.bandwidth import read_bandwidth
from cpmbee.bench.environment import write_result
from cpmbee.export import functions, quantized_functions
from cpmbee.export.quantized_functions import BLOCK_SIZES, CONTRIB, LANES, QUANTIZED_LINEAR
from cpmbee.machine import physical_cores
from cpmbee.onnxruntime_import import import_onnxruntime

if TYPE_CHECKING:
    import onnxruntime as ort
else:
    ort = import_onnxruntime()

NARROW, WIDE = 2048, 5120
PAIRS = 16
PARAMETERS = 2 * PAIRS * NARROW * WIDE
ROWS = (1, 3, 8, 16, 256, 512)
SECONDS = 0.3  # that one contender runs before the next has its turn

Nodes = tuple[list[onnx.NodeProto], list[onnx.TensorProto]]


@dataclass
class Contender:
    """A session and its times."""

    name: str
    bits: int
    block_size: int | None
    weight_bytes: int
    session: ort.InferenceSession
    seconds: dict[int, list[float]] = field(default_factory=dict)  # rows: of one pass through the model

    def run(self, rows: int, least: int) -> None:
        """Pass ``least`` times, and more while it takes less than ``SECONDS``."""
        x = np.random.default_rng(0).standard_normal((rows, NARROW), dtype=np.float32)
        self.session.run(None, {"x": x})
        times = self.seconds.setdefault(rows, [])
        end = time.perf_counter() + SECONDS
        while least > 0 or time.perf_counter() < end:
            start = time.perf_counter()
            self.session.run(None, {"x": x})
            times.append(time.perf_counter() - start)
            least -= 1

    def result(self, rows: int, bandwidth: float) -> dict[str, Any]:
        """One line of the table."""
        seconds = statistics.median(self.seconds[rows])
        return {
            "kernel": self.name,
            "bits": self.bits,
            "block_size": self.block_size,
            "rows": rows,
            "milliseconds": seconds * 1e3,
            "fastest_milliseconds": min(self.seconds[rows]) * 1e3,
            "weights_gb_per_s": self.weight_bytes / seconds / 1e9,
            "of_read_bandwidth": self.weight_bytes / seconds / bandwidth,
            "gflop_per_s": 2 * rows * PARAMETERS / seconds / 1e9,
        }


def main() -> None:
    """Measure, print a Markdown table and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--block-sizes", type=int, nargs="*", default=BLOCK_SIZES)
    parser.add_argument("--rounds", type=int, default=3, help="turns that each contender has")
    parser.add_argument("--no-write", action="store_true", help="do not keep the result")
    arguments = parser.parse_args()

    bandwidths = [read_bandwidth(arguments.threads)]
    results: list[dict[str, Any]] = []
    for bits in (4, 8):
        contenders = [c for size in arguments.block_sizes for c in block_contenders(bits, size, arguments.threads)]
        if bits == 8:
            contenders.append(dynamic_contender(arguments.threads))
        for rows in arguments.rows:
            for _ in range(arguments.rounds):
                for contender in contenders:
                    contender.run(rows, least=2)
        bandwidths.append(read_bandwidth(arguments.threads))
        results += [c.result(rows, max(bandwidths)) for c in contenders for rows in arguments.rows]
    bandwidth = max(bandwidths)
    for result in results:
        result["of_read_bandwidth"] = result["weights_gb_per_s"] * 1e9 / bandwidth
    print(f"Read bandwidth: {bandwidth / 1e9:.1f} GB/s with {arguments.threads} threads.\n")
    print_table(results, arguments.rows)
    if not arguments.no_write:
        payload = {"threads": arguments.threads, "kernel": native.kernels()[QUANTIZED_LINEAR], "results": results}
        write_result("quantized_linear", {"read_bandwidth_gb_per_s": bandwidth / 1e9, **payload})


def print_table(results: list[dict[str, Any]], rows: list[int]) -> None:
    """Milliseconds for all matrices; for few rows the share of the read bandwidth, for many GFLOP/s."""
    print("| kernel | bits | block |" + "".join(f" {n} row{'s' * (n > 1)} |" for n in rows))
    print("|---|---:|---:|" + "---:|" * len(rows))
    lines: dict[tuple[Any, ...], list[str]] = {}
    for r in results:
        note = f"{r['of_read_bandwidth']:.0%}" if r["rows"] <= LANES else f"{r['gflop_per_s']:.0f}"
        key = (r["kernel"], r["bits"], r["block_size"] or "-")
        lines.setdefault(key, []).append(f"{r['milliseconds']:.2f} ms ({note})")
    for key, cells in lines.items():
        print("| " + " | ".join(map(str, (*key, *cells))) + " |")


def block_contenders(bits: int, block_size: int, threads: int) -> list[Contender]:
    """Our kernels and ``MatMulNBits``, on one model."""
    nodes, weight_bytes = quantized_chain(bits, block_size)
    opsets = [
        helper.make_opsetid("", functions.FUNCTION_OPSET),
        helper.make_opsetid(functions.DOMAIN, functions.DOMAIN_VERSION),
        helper.make_opsetid(CONTRIB, 1),
    ]
    model = chain_model(nodes, opsets, [quantized_functions.quantized_linear()])
    sessions = (open_session(model, threads, use_native=own) for own in (True, False))
    names = (QUANTIZED_LINEAR, "MatMulNBits")
    return [
        Contender(name, bits, block_size, weight_bytes, session) for name, session in zip(names, sessions, strict=True)
    ]


def quantized_chain(bits: int, block_size: int) -> tuple[Nodes, int]:
    """Random weights, scaled so that activations stay near 1."""
    rng = np.random.default_rng(bits)

    def product(value: str, index: int, k: int, n: int) -> Nodes:
        weight = rng.integers(0, 256, (n // LANES, k * bits // 32, LANES, 4), dtype=np.uint8)
        spread = (1 << bits) / np.sqrt(12)
        scales = np.full((n // LANES, k // block_size, LANES), 1 / (spread * np.sqrt(k)), np.float16)
        node = helper.make_node(
            QUANTIZED_LINEAR,
            [value, f"weight{index}", f"scales{index}"],
            [f"y{index}"],
            domain=functions.DOMAIN,
            bits=bits,
            block_size=block_size,
            in_features=k,
            out_features=n,
        )
        tensors = [numpy_helper.from_array(weight, f"weight{index}"), numpy_helper.from_array(scales, f"scales{index}")]
        return [node], tensors

    return chain(product), PARAMETERS * bits // 8 + PARAMETERS // block_size * 2


def dynamic_contender(threads: int) -> Contender:
    """``DynamicQuantizeMatMul`` with a scale for each output."""
    rng = np.random.default_rng(0)

    def product(value: str, index: int, k: int, n: int) -> Nodes:
        weight = rng.integers(-127, 128, (k, n), dtype=np.int8)
        scales = np.full(n, 1 / (73 * np.sqrt(k)), np.float32)
        inputs = [value, f"weight{index}", f"scales{index}"]
        node = helper.make_node("DynamicQuantizeMatMul", inputs, [f"y{index}"], domain=CONTRIB)
        return [node], [numpy_helper.from_array(weight, inputs[1]), numpy_helper.from_array(scales, inputs[2])]

    opsets = [helper.make_opsetid("", functions.FUNCTION_OPSET), helper.make_opsetid(CONTRIB, 1)]
    session = open_session(chain_model(chain(product), opsets, []), threads, use_native=False)
    weight_bytes = PARAMETERS + PAIRS * (NARROW + WIDE) * 4
    return Contender("DynamicQuantizeMatMul", 8, None, weight_bytes, session)


def chain(product: Callable[[str, int, int, int], Nodes]) -> Nodes:
    """``product(value, index, in_features, out_features)`` makes each link."""
    nodes: list[onnx.NodeProto] = []
    tensors: list[onnx.TensorProto] = []
    value = "x"
    for index in range(2 * PAIRS):
        new_nodes, new_tensors = product(value, index, *((NARROW, WIDE) if index % 2 == 0 else (WIDE, NARROW)))
        nodes += new_nodes
        tensors += new_tensors
        value = nodes[-1].output[0]
    nodes.append(helper.make_node("Identity", [value], ["y"]))
    return nodes, tensors


def chain_model(nodes: Nodes, opsets: list[onnx.OperatorSetIdProto], bodies: list[onnx.FunctionProto]) -> bytes:
    """The serialized model from ``x`` to ``y``."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", NARROW]) for name in "xy"]
    graph = helper.make_graph(nodes[0], "chain", value[:1], value[1:], nodes[1])
    model = helper.make_model(graph, opset_imports=opsets, functions=bodies, ir_version=9)
    serialized: bytes = model.SerializeToString()
    return serialized


def open_session(model: bytes, threads: int, *, use_native: bool) -> ort.InferenceSession:
    """A CPU session of the engine's kind."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if use_native:
        native.register(options)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    main()
