"""The weights that a quantized file stores, under the names of the checkpoint they were made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from cpmbee.errors import ModelFolderError
from cpmbee.export.graph import build_graph
from cpmbee.export.packing import BLOCK_SIZES
from cpmbee.export.parallel import in_order
from cpmbee.export.quantize import Quantization, QuantizedMatrix, StoredMatrix, copy_rows
from cpmbee.export.report import Check
from cpmbee.export.sources import TensorSource
from cpmbee.export.weights import QUANTIZED
from cpmbee.folder import MANIFEST, ModelFolder

Array = NDArray[Any]

# Relative RMS error of a tensor that is still the same tensor, by bits: twice that of blocks of 128 where every block
# has one weight that dwarfs the others.
LARGEST_ERROR = {4: 0.5, 8: 0.05}


class _Place(NamedTuple):
    """Where a checkpoint tensor is inside a quantized one."""

    matrix: QuantizedMatrix
    first: int
    rows: int


def stored_quantization(model: ModelFolder) -> Quantization | None:
    """How a folder's matrices are quantized, or None where they are not.

    Raises:
        ModelFolderError: they are, and its manifest does not say how.
    """
    body, head = (QUANTIZED.get(model.precision.get(group, "")) for group in ("attention", "embedding"))
    if body is None:
        return None
    if head is None or model.block_size is None or model.block_size not in BLOCK_SIZES:
        raise ModelFolderError(
            f"{model.path / MANIFEST}: says int{body}, but not how: the precision of the embedding must be one of "
            f"{', '.join(QUANTIZED)}, and the block size one of {', '.join(map(str, BLOCK_SIZES))}"
        )
    return Quantization(body, head, model.block_size)


class DequantizedSource:
    """A checkpoint whose quantized matrices are read from an exported file instead.

    The factors that the export folded into a matrix are taken out again.

    Args:
        source: the checkpoint.
        model: its export.
        quantization: how that one is quantized.
    """

    def __init__(self, source: TensorSource, model: ModelFolder, quantization: Quantization) -> None:
        self.config = source.config
        self.vocab_file = source.vocab_file
        self.format = source.format
        self._source = source
        self._tensors = external_tensors(model.model)
        self._places: dict[str, _Place] = {}
        planned = build_graph(source.config, "int8" if quantization.body_bits == 8 else "int4", quantization)
        for matrix in planned.quantized:
            first = 0
            for name, rows in zip(matrix.sources, matrix.dims_out, strict=True):
                self._places[name] = _Place(matrix, first, rows)
                first += rows

    @property
    def quantized(self) -> dict[str, int]:
        """Checkpoint tensors that are quantized, and the bits of their weights."""
        return {name: place.matrix.layout.bits for name, place in self._places.items()}

    def read(self, name: str) -> Array:
        """One tensor; fp32 where it is quantized."""
        place = self._places.get(name)
        if place is None:
            return self._source.read(name)
        return self._stored(place).rows(place.first, place.first + place.rows)

    def error(self, name: str) -> float:
        """RMS of what quantization changed over that of the checkpoint's values; 0 where both are zero."""
        exact, place = self.original(name), self._places[name]
        stored = self._stored(place)

        def sums(start: int) -> tuple[float, float]:
            wide = np.empty((min(stored.panel_rows, place.rows - start), stored.dim_in), np.float32)
            left = np.empty_like(wide)
            copy_rows([exact], start, 1.0, wide)
            stored.write(place.first + start, left)
            left -= wide
            return float(np.vdot(left, left)), float(np.vdot(wide, wide))

        panels = list(in_order(sums, range(0, place.rows, stored.panel_rows)))
        error, power = (math.fsum(column) for column in zip(*panels, strict=True))
        if error == 0:
            return 0.0
        return math.inf if power == 0 else math.sqrt(error / power)

    def _stored(self, place: _Place) -> StoredMatrix:
        matrix = place.matrix
        packed, scales = (self._tensors[tensor.name] for tensor in (matrix.weight, matrix.scales))
        return StoredMatrix(packed, scales, matrix.layout, matrix.dim_in, matrix.factor)

    def original(self, name: str) -> Array:
        """The tensor that the checkpoint has."""
        return self._source.read(name)

    def originals(self, name: str) -> tuple[Array, ...]:
        """What the checkpoint makes a tensor of."""
        return self._source.originals(name)


def check_weights(source: DequantizedSource, tell: Callable[[str, float], None]) -> Check:
    """Whether the file's weights are the checkpoint's, but for the rounding."""
    worst, where, passed = 0.0, "", True
    for number, (name, bits) in enumerate(source.quantized.items()):
        tell("comparing weights", number / len(source.quantized))
        error = source.error(name)
        passed = passed and error <= LARGEST_ERROR[bits]
        if error / LARGEST_ERROR[bits] >= worst:
            worst, where = error / LARGEST_ERROR[bits], f"{error:.1e} (int{bits}) in {name}"
    detail = f"against the checkpoint, dequantized: largest relative RMS error {where}, {len(source.quantized)} tensors"
    return Check("weights", passed, detail)


def external_tensors(model_file: Path) -> dict[str, Array]:
    """The tensors of a model's data file, mapped."""
    model = onnx.load(model_file, load_external_data=False)
    tensors: dict[str, Array] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        path, offset = model_file.with_name(entry["location"]), int(entry["offset"])
        tensors[tensor.name] = np.memmap(path, dtype, "r", offset, tuple(tensor.dims))
    return tensors
