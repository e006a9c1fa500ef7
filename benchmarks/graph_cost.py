"""The bytes and operations of each kind of operator in a model file: what its time is held against."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

from cpmbee.config import ModelConfig

LOOKUPS = ("Gather", "QuantizedEmbedding")  # read some rows of a table, not all of it
HEAD = "head"  # nodes whose names begin so see one token of each sequence
NUMBER_BYTES: dict[int, int] = {
    TensorProto.FLOAT: 4,
    TensorProto.FLOAT16: 2,
    TensorProto.BFLOAT16: 2,
    TensorProto.UINT8: 1,
    TensorProto.INT8: 1,
}


@dataclass
class Cost:
    """What a run of one kind of operator has to do at least.

    Attributes:
        bytes: to read.
        operations: additions and multiplications.
        quantized: whether products are of bytes.
    """

    bytes: float = 0.0
    operations: float = 0.0
    quantized: bool = False

    def seconds(self, bandwidth: float, rates: dict[str, float]) -> float:
        """The least time it can take: reading and computing overlap.

        Args:
            bandwidth: bytes per second that memory delivers.
            rates: operations per second, of ``"fp32"`` numbers and of ``"int8"``.
        """
        return max(self.bytes / bandwidth, self.operations / rates["int8" if self.quantized else "fp32"])


def costs(
    model: ModelProto, config: ModelConfig, tokens: int, keys: int, sequences: int, cache_rows: float
) -> dict[str, Cost]:
    """Cost of each kind of operator in one run.

    Args:
        model: the graph; its data need not be loaded.
        config: of the model.
        tokens: that the run reads of each sequence.
        keys: that each of them sees, itself included.
        sequences: that run together.
        cache_rows: that all of them see. One that several beams share counts once: attention takes it for each of
            them, but a layer's rows stay in the processor's cache meanwhile.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    declared = {value.name: value for value in model.graph.input}
    for node in model.graph.node:  # a stored matrix that is read through a conversion
        if node.op_type == "Cast" and node.input[0] in stored:
            stored[node.output[0]] = stored[node.input[0]]
    found: dict[str, Cost] = defaultdict(Cost)
    for node in model.graph.node:
        cost = found[node.op_type]
        if node.op_type == "BucketedAttention":
            cost.operations += 4.0 * config.attention_dim * tokens * keys * sequences
            cost.bytes += cache_row_bytes(node, declared) * cache_rows
        elif node.op_type not in (*LOOKUPS, "Cast"):
            for tensor in _matrices(node, stored):
                bits = next((attribute.i for attribute in node.attribute if attribute.name == "bits"), 0)
                numbers = math.prod(tensor.dims)
                cost.bytes += numbers * NUMBER_BYTES.get(tensor.data_type, 0)
                if not bits or tensor.data_type == TensorProto.UINT8:  # else the scales
                    rows = sequences * (1 if node.name.startswith(HEAD) else tokens)
                    cost.operations += 2.0 * rows * numbers * (8 / bits if bits else 1)
                cost.quantized = cost.quantized or bits > 0
    return {op: cost for op, cost in found.items() if cost.bytes or cost.operations}


def cache_row_bytes(node: NodeProto, declared: dict[str, ValueInfoProto]) -> int:
    """Bytes that one token takes in the cache of one layer: a row of every input that the node gives back grown.

    Args:
        node: attention.
        declared: the graph's inputs by name.
    """
    size = 0
    for name in node.input:
        if f"present_{name}" in node.output:
            tensor = declared[name].type.tensor_type
            size += NUMBER_BYTES[tensor.elem_type] * math.prod(dim.dim_value for dim in tensor.shape.dim[1:])
    return size


def read_graph(path: str) -> ModelProto:
    """A model file without its data."""
    return onnx.load(path, load_external_data=False)


def _matrices(node: NodeProto, stored: dict[str, TensorProto]) -> Iterator[TensorProto]:
    return (stored[name] for name in node.input if name in stored and len(stored[name].dims) > 1)
