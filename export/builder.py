"""Collects the nodes of a graph and the list of tensors it will need, before any tensor is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from cpmbee.export.quantize import QuantizedMatrix
from cpmbee.export.weights import StoredTensor

CONTRIB = "com.microsoft"


class GraphBuilder:
    """Nodes in execution order, small constants, and the tensors to be stored, in that order.

    Every value is named after the scope it is made in (``layers.0.attention/qkv``), so that a profile of the graph
    reads like the model.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.stored: dict[str, StoredTensor] = {}
        self.quantized: list[QuantizedMatrix] = []

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node with one output, which is called like the node; returns that name."""
        self.multi(op, inputs, [name], name, domain, **attributes)
        return name

    def multi(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        name: str,
        domain: str = "",
        **attributes: Any,
    ) -> None:
        """Add a node with any outputs; an empty output name is one that nobody needs."""
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes))

    def constant(self, name: str, value: NDArray[Any] | np.generic) -> str:
        """A small constant, kept inside the graph; asking for the same name again gives the same constant."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def weight(self, tensor: StoredTensor) -> str:
        """A tensor made from the checkpoint, read only when the folder is written."""
        if tensor.name in self.stored:
            raise ValueError(f"two tensors are called {tensor.name}")
        self.stored[tensor.name] = tensor
        return tensor.name

    def quantized_matrix(self, matrix: QuantizedMatrix) -> list[str]:
        """A quantized matrix made from the checkpoint: the names of its two tensors."""
        self.quantized.append(matrix)
        return [self.weight(matrix.weight), self.weight(matrix.scales)]
