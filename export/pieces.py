"""A model cut into pieces that run one after the other, so that only one of them is in memory.

Any place between two nodes is a place to cut: a piece reads what earlier pieces made and makes what later ones read.
Weights decide where it happens, a piece has as many nodes as its budget of bytes allows. All calls go through a piece
before the next one is loaded, which costs their activations but reads the weights once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from cpmbee import native
from cpmbee.export.probes import GraphInputs
from cpmbee.machine import physical_cores
from cpmbee.onnxruntime_import import import_onnxruntime

if TYPE_CHECKING:
    import onnxruntime as ort
else:
    ort = import_onnxruntime()

Array = NDArray[Any]

PIECE_BYTES = 64 << 20  # of stored weights; function bodies make some four copies of a piece while it is loaded
SMALL_BYTES = 64 << 20  # of all stored weights: threads then lose more in waiting than they gain
OUTPUT = "logits"


@dataclass(frozen=True)
class Piece:
    """Some consecutive nodes.

    Attributes:
        nodes: in order.
        weights: names of the weights they read.
        inputs: values that they read and do not make: the graph's inputs, or made by earlier pieces.
        outputs: values that later pieces read, or the graph's outputs.
    """

    nodes: tuple[onnx.NodeProto, ...]
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def cut(graph: onnx.GraphProto, sizes: Mapping[str, int], budget: int) -> list[Piece]:
    """Pieces of a graph.

    Args:
        graph: whose nodes have no subgraphs.
        sizes: bytes of its weights by name.
        budget: bytes of weights that a piece should not exceed; one node may.
    """
    groups: list[list[onnx.NodeProto]] = [[]]
    inside: set[str] = set()  # weights of the last group
    for node in graph.node:
        new = {name for name in node.input if name in sizes} - inside
        if new and inside and sum(sizes[name] for name in new | inside) > budget:
            groups.append([])
            inside = set()
            new = {name for name in node.input if name in sizes}
        groups[-1].append(node)
        inside |= new
    known = {tensor.name for tensor in graph.initializer}
    wanted = {value.name for value in graph.output}
    pieces = []
    for nodes in reversed(groups):
        made = {name for node in nodes for name in node.output if name}
        read = dict.fromkeys(name for node in nodes for name in node.input if name and name not in made)
        inputs = tuple(name for name in read if name not in known)
        pieces.append(Piece(tuple(nodes), tuple(n for n in read if n in sizes), inputs, tuple(sorted(made & wanted))))
        wanted |= set(inputs)
    return pieces[::-1]


class PiecewiseModel:
    """A model that runs piece by piece.

    Args:
        model: without its weights.
        weights: the tensors of its data file, by name.
        use_native: with the native kernels, or with the function bodies of the file.
    """

    def __init__(self, model: onnx.ModelProto, weights: Mapping[str, Array], *, use_native: bool) -> None:
        self._model = model
        self._weights = weights
        self._use_native = use_native
        self._values: dict[str, ort.OrtValue] = {}  # weights of the piece at hand
        self._fed: dict[str, Array] = {}  # others of its weights, which each call brings
        self._declared: dict[str, onnx.ValueInfoProto] = {value.name: value for value in model.graph.input}
        self._constants = [tensor for tensor in model.graph.initializer if tensor.name not in weights]
        self._pieces = cut(model.graph, {name: array.nbytes for name, array in weights.items()}, PIECE_BYTES)

    def run_all(self, inputs: Sequence[GraphInputs]) -> Iterator[NDArray[np.float32]]:
        """Logits (B, R, V + E) of one call after the other, on one cache that is empty at first."""
        rows = 1 + max((int(call.slots.max()) for call in inputs), default=0)
        calls: list[dict[str, Array]] = [dict(call._asdict()) for call in inputs]
        for number, piece in enumerate(self._pieces):
            session = None  # before the next one takes memory
            self._values, self._fed = {}, {}
            session = self._session(piece, calls[0])
            caches = self._caches(piece, rows)
            later = {name for after in self._pieces[number + 1 :] for name in after.inputs}
            for call in calls:
                feeds = {name: caches[name] if name in caches else call[name] for name in piece.inputs}
                made = dict(zip(piece.outputs, session.run(list(piece.outputs), {**feeds, **self._fed}), strict=True))
                caches = {name: made.pop(f"present_{name}") for name in caches}
                call.update(made)
                if OUTPUT in made:
                    yield call.pop(OUTPUT)
                for name in call.keys() - later:
                    del call[name]

    def _session(self, piece: Piece, call: Mapping[str, Array]) -> ort.InferenceSession:
        """A piece, ready to run."""
        options = self._options()
        names = {name for node in piece.nodes for name in node.input}
        inputs = [self._input(name, call) for name in piece.inputs]
        outputs = [onnx.ValueInfoProto(name=name) for name in piece.outputs]  # types are the runtime's to find
        constants = [tensor for tensor in self._constants if tensor.name in names]
        graph = helper.make_graph(piece.nodes, "piece", inputs, [], initializer=constants)
        graph.output.extend(outputs)
        model = helper.make_model(
            graph,
            opset_imports=self._model.opset_import,
            functions=self._model.functions,
            ir_version=self._model.ir_version,
        )
        model, weights = self._prepared(model, {name: self._weights[name] for name in piece.weights})
        model.graph.initializer.extend(_placeholder(name, array) for name, array in weights.items())
        self._values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}
        options.add_external_initializers(list(self._values), list(self._values.values()))
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        small = sum(array.nbytes for array in self._weights.values()) < SMALL_BYTES
        options.intra_op_num_threads = 1 if small else physical_cores()
        options.log_severity_level = 3
        if self._use_native:
            native.register(options)
        return options

    def _prepared(self, model: onnx.ModelProto, weights: dict[str, Array]) -> tuple[onnx.ModelProto, dict[str, Array]]:
        """A piece and its weights as they are to run."""
        return model, weights

    def _input(self, name: str, call: Mapping[str, Array]) -> onnx.ValueInfoProto:
        """What the runtime has to know of a value that a piece reads."""
        if name in self._declared:
            return self._declared[name]
        value = call[name]
        dtype = helper.np_dtype_to_tensor_dtype(value.dtype)
        info: onnx.ValueInfoProto = helper.make_tensor_value_info(name, dtype, [None] * value.ndim)
        return info

    def _caches(self, piece: Piece, rows: int) -> dict[str, Array]:
        """Empty caches of the piece's layers: whatever the graph reads and a call does not bring."""
        caches = {}
        for name in piece.inputs:
            if name in self._declared and name not in GraphInputs._fields:
                tensor = self._declared[name].type.tensor_type
                shape = (rows, *(dim.dim_value for dim in tensor.shape.dim[1:]))
                caches[name] = np.zeros(shape, helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        return caches


def _placeholder(name: str, array: Array) -> onnx.TensorProto:
    """Stands for a tensor that the session is given."""
    dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = onnx.TensorProto(name=name, dims=array.shape, data_type=dtype)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=name.replace("/", "."))
    return tensor
