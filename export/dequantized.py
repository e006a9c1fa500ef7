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
from cpmbee.export.balance import Factors, blocks_of, factors_in
from cpmbee.export.graph import build_graph
from cpmbee.export.packing import BLOCK_SIZES, BlockFormat, Float32
from cpmbee.export.parallel import in_order
from cpmbee.export.quantize import Quantization, QuantizedMatrix, StoredMatrix, copy_rows, reciprocal
from cpmbee.export.report import Check
from cpmbee.export.sources import TensorSource
from cpmbee.export.weights import QUANTIZED, linear_scale, scaled
from cpmbee.folder import MANIFEST, ModelFolder
from cpmbee.json_file import read_json_object

Array = NDArray[Any]

# A weight is at most half a step from its nearest number, where that number exists. The search takes the step that has
# the least squared error for a block, so that what it clips is bounded, too: this many times that of half a step each.
CLIPPED = 2.1
SMALLEST_STEP = 2.0**-25  # steps are fp16 numbers: what is smaller may be zero
# Calibration moves weights away from their nearest numbers to make up for others: by at most this many times as much,
# and less than this share of the block's own squares.
CORRECTED, CORRECTED_SHARE = 64.0, 0.36


class _Place(NamedTuple):
    """Where a checkpoint tensor is inside a quantized one."""

    matrix: QuantizedMatrix
    first: int
    rows: int


class WeightError(NamedTuple):
    """What quantization changed about a tensor.

    Attributes:
        relative: RMS of the changes over that of the values; 0 where both are zero.
        block: largest squared error of a block, relative to what a right one may have.
        where: the row and the first input of that block.
    """

    relative: float
    block: float
    where: tuple[int, int]


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
        self._calibrated = _is_calibrated(model)
        self._tensors = external_tensors(model.model)
        self._places: dict[str, _Place] = {}
        self._blocks = {name: block for block in blocks_of(source.config) for name in (*block.readers, block.out)}
        self._factors: dict[str, Factors] = {}
        planned = build_graph(source.config, "int8" if quantization.body_bits == 8 else "int4", quantization)
        self._norms = {
            tensor.sources[0]: name for name, tensor in planned.stored.items() if name.endswith("/norm_weight")
        }
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
        values = self._stored(place).rows(place.first, place.first + place.rows)
        if name in self._blocks:
            self.factors(name).undo(values, 0)
        return values

    def factors(self, name: str) -> Factors:
        """What the export multiplied a matrix of a block by, as the file shows it (`cpmbee.export.balance`).

        These are the powers of two nearest to what became of the norm's weight, and of the rows of the inner matrix.
        What is left of a wrong weight is not taken for a factor, and shows in what the model computes.
        """
        block = self._blocks[name]
        if block.norm not in self._factors:
            behind_norm = self._behind_norm(block.norm)
            inner = reciprocal(self._rows_over(block.inner, behind_norm))
            self._factors[block.norm] = Factors(inner, behind_norm)
        inner, behind_norm = self._factors[block.norm]
        return factors_in(block, name, self.config, behind_norm, inner)

    def _behind_norm(self, name: str) -> Float32:
        """Powers of two nearest to the checkpoint's norm over the file's."""
        factor = linear_scale(self.config.hidden_size)
        expected = scaled(self._source.read(name), factor, np.dtype(np.float32))
        stored = np.asarray(self._tensors[self._norms[name]])
        return _powers_of_two(expected, stored)

    def _rows_over(self, name: str, columns: Float32) -> Float32:
        """Powers of two that rows of a matrix were multiplied by."""
        place = self._places[name]
        exact, stored = self.original(name), self._stored(place)
        same = Factors(np.ones(place.rows, np.float32), columns)

        def panel(start: int) -> tuple[Float32, Float32]:
            wide = np.empty((min(stored.panel_rows, place.rows - start), stored.dim_in), np.float32)
            left = np.empty_like(wide)
            copy_rows([exact], start, 1.0, wide)
            same.apply(wide, start)
            stored.write(place.first + start, left)
            return np.einsum("ri,ri->r", wide, left), np.einsum("ri,ri->r", wide, wide)

        panels = list(in_order(panel, range(0, place.rows, stored.panel_rows)))
        alike, power = (np.concatenate(sums) for sums in zip(*panels, strict=True))
        return _powers_of_two(alike, power)

    def error(self, name: str) -> WeightError:
        """How far a tensor's stored weights are from the checkpoint's."""
        exact, place = self.original(name), self._places[name]
        stored = self._stored(place)._replace(factor=1.0)
        factors = self.factors(name) if name in self._blocks else None
        calibrated = self._calibrated and factors is not None

        def panel(start: int) -> tuple[float, float, float, tuple[int, int]]:
            wide = np.empty((min(stored.panel_rows, place.rows - start), stored.dim_in), np.float32)
            left = np.empty_like(wide)
            copy_rows([exact], start, place.matrix.factor, wide)
            if factors is not None:
                factors.apply(wide, start)
            stored.write(place.first + start, left)
            left -= wide
            scales = stored.block_scales(place.first + start, len(wide))
            ratios = _block_errors(left, wide, scales, stored.layout, calibrated)
            row, block = np.unravel_index(ratios.argmax(), ratios.shape)
            where = start + int(row), int(block) * stored.layout.block_size
            return float(np.vdot(left, left)), float(np.vdot(wide, wide)), float(ratios[row, block]), where

        panels = list(in_order(panel, range(0, place.rows, stored.panel_rows)))
        error, power = math.fsum(p[0] for p in panels), math.fsum(p[1] for p in panels)
        relative = 0.0 if error == 0 else math.inf if power == 0 else math.sqrt(error / power)
        _, _, block, where = max(panels, key=lambda p: p[2])
        return WeightError(relative, block, where)

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


def _powers_of_two(values: Float32, others: Float32) -> Float32:
    """Nearest to the ratio of values; 1 where there is none."""
    known = (values * np.sign(others) > 0) & np.isfinite(values) & np.isfinite(others)
    ratio = np.divide(values, others, out=np.ones_like(values), where=known)
    powers: Float32 = np.exp2(np.rint(np.log2(ratio)))
    return powers


def check_weights(source: DequantizedSource, tell: Callable[[str, float], None]) -> Check:
    """Whether the file's weights are the checkpoint's, block by block, but for the rounding."""
    errors: dict[str, WeightError] = {}
    for number, name in enumerate(source.quantized):
        tell("comparing weights", number / len(source.quantized))
        errors[name] = source.error(name)
    worst = max(errors, key=lambda name: errors[name].relative)
    detail = (
        f"against the checkpoint, dequantized: largest relative RMS error {errors[worst].relative:.1e} "
        f"(int{source.quantized[worst]}) in {worst}, {len(errors)} tensors"
    )
    wrong = [name for name, error in errors.items() if error.block > 1]
    if wrong:
        row, column = errors[wrong[0]].where
        detail += (
            f"; {len(wrong)} are further off than rounding explains, first {wrong[0]} in row {row}, input {column}"
        )
    return Check("weights", not wrong, detail)


def _block_errors(left: Float32, wide: Float32, scales: Float32, layout: BlockFormat, calibrated: bool) -> Float32:
    """Squared error of each block relative to the largest that rounding can have, (rows, blocks).

    Args:
        left: what quantization changed, (rows, inputs).
        wide: the values themselves.
        scales: of the stored numbers, (rows, blocks).
        layout: bits and block size.
        calibrated: whether errors were corrected by other weights.
    """
    numbers = layout.zero_point - 1
    possible = np.square(scales / 2) * np.float32(CLIPPED) + np.float32((numbers * SMALLEST_STEP) ** 2)
    possible *= layout.block_size
    if calibrated:
        share = np.float32(CORRECTED_SHARE) * _block_squares(wide, layout.block_size)
        possible = np.maximum(possible, np.minimum(np.float32(CORRECTED) * possible, share))
    ratios: Float32 = _block_squares(left, layout.block_size) / possible
    return np.nan_to_num(ratios, nan=np.inf)


def _block_squares(values: Float32, block_size: int) -> Float32:
    """Sum of squares of each block, (rows, blocks)."""
    if padding := -values.shape[1] % block_size:
        values = np.pad(values, ((0, 0), (0, padding)))
    blocks = values.reshape(len(values), -1, block_size)
    squares: Float32 = np.einsum("rbi,rbi->rb", blocks, blocks)
    return squares


def _is_calibrated(model: ModelFolder) -> bool:
    """Whether the manifest says so."""
    manifest = read_json_object(model.path / MANIFEST, "the manifest of an exported model", ModelFolderError)
    said = manifest.get("quantization")
    return isinstance(said, dict) and said.get("calibrated") is True


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
