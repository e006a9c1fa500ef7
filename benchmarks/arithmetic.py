"""How fast the processor multiplies: the limit of prefill, measured with ONNX Runtime's products of square matrices."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto, helper

from cpmbee.onnxruntime_import import import_onnxruntime

if TYPE_CHECKING:
    import onnxruntime as ort
else:
    ort = import_onnxruntime()

SIZE = 1536
REPEATS = 9
KINDS = {"fp32": ("MatMul", TensorProto.FLOAT, np.float32), "int8": ("MatMulInteger", TensorProto.INT8, np.int8)}


def operations_per_second(threads: int) -> dict[str, float]:
    """Additions and multiplications in a second, of fp32 numbers and of bytes.

    Args:
        threads: that multiply.
    """
    return {kind: _measure(kind, threads) for kind in KINDS}


def _measure(kind: str, threads: int) -> float:
    op, stored, dtype = KINDS[kind]
    left = TensorProto.UINT8 if kind == "int8" else stored
    rng = np.random.default_rng(0)
    numbers = rng.integers(-9, 9, (SIZE, SIZE)).astype(dtype)
    weight = helper.make_tensor("b", stored, (SIZE, SIZE), numbers.tobytes(), raw=True)
    output = TensorProto.INT32 if kind == "int8" else stored
    graph = helper.make_graph(
        [helper.make_node(op, ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", left, (SIZE, SIZE))],
        [helper.make_tensor_value_info("c", output, (SIZE, SIZE))],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"a": rng.integers(0, 9, (SIZE, SIZE)).astype(np.uint8 if kind == "int8" else dtype)}
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        session.run(None, feed)
        seconds.append(time.perf_counter() - start)
    return 2 * SIZE**3 / statistics.median(seconds[1:])
