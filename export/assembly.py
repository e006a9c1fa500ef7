"""What the blocks of a graph share while it grows: products with matrices of any precision, and the counts so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from cpmbee.cache_types import CacheType
from cpmbee.config import ModelConfig
from cpmbee.export import weights
from cpmbee.export.builder import GraphBuilder
from cpmbee.export.exact_linear import EXACT_LINEAR
from cpmbee.export.functions import DOMAIN
from cpmbee.export.quantize import Quantization, QuantizedMatrix
from cpmbee.export.quantized_functions import QUANTIZED_LINEAR

FLOAT = TensorProto.FLOAT


@dataclass
class Assembly:
    """What all blocks share while the graph grows.

    Attributes:
        graph: receives nodes and tensors.
        config: the model.
        dtype: of stored matrices that are not quantized.
        quantization: how matrices are quantized; None where they are not.
        cache: how its rows are stored.
        num_blocks: kept blocks so far, n in `cpmbee.export.weights`.
        num_caches: attention blocks so far.
        embedding: the embedding, which is the head as well, where it is quantized.
    """

    graph: GraphBuilder
    config: ModelConfig
    dtype: np.dtype[np.float32] | np.dtype[np.float16]
    quantization: Quantization | None = None
    cache: CacheType = "fp32"
    num_blocks: int = 0
    num_caches: int = 0
    embedding: QuantizedMatrix | None = None

    @property
    def folds(self) -> bool:
        """Whether factors go into the matrices; fp16 files keep those bit for bit instead."""
        return self.dtype == np.float32

    def linear(
        self,
        value: str,
        out: str,
        matrix: str,
        sources: tuple[str, ...],
        dim_in: int,
        dims_out: tuple[int, ...],
        factor: float = 1.0,
    ) -> str:
        """``out = value * matrix * factor``; the matrix is made of checkpoint tensors that read the same input."""
        if self.quantization is not None:
            bits = self.quantization.body_bits
            return self.quantized_linear(
                value, out, self.quantization.matrix(matrix, sources, dim_in, dims_out, factor, bits)
            )
        name = self.graph.weight(weights.stacked_linears(matrix, sources, dim_in, dims_out, self.dtype, factor))
        if self.dtype != np.float32:  # the runtime converts a constant once, when it loads the model
            name = self.graph.node("Cast", [name], f"{name}/fp32", to=FLOAT)
        return self.graph.node("MatMul", [value, name], out)

    def quantized_linear(self, value: str, out: str, matrix: QuantizedMatrix) -> str:
        """``out = value * matrix``."""
        tensors = self.graph.quantized_matrix(matrix)
        op = EXACT_LINEAR if matrix.exact_activations else QUANTIZED_LINEAR
        return self.graph.node(op, [value, *tensors], out, DOMAIN, **quantized_attributes(matrix))

    def times(self, value: str, factor: float, name: str) -> str:
        """``value * factor``."""
        scalar = self.graph.constant(f"{name}/factor", np.float32(factor))
        return self.graph.node("Mul", [value, scalar], name)


def quantized_attributes(matrix: QuantizedMatrix) -> dict[str, int]:
    """Attributes of a node that reads a quantized matrix."""
    return {
        "bits": matrix.layout.bits,
        "block_size": matrix.layout.block_size,
        "in_features": matrix.dim_in,
        "out_features": matrix.dim_out,
    }
