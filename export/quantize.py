"""Matrices of a checkpoint as quantized tensors of the file, a few panels of rows in memory at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpmbee.export.error_feedback import Moments, quantize_corrected
from cpmbee.export.packing import LANES, BlockFormat, Float16, Float32, Uint8
from cpmbee.export.parallel import in_order
from cpmbee.export.plain_quantize import Quantized
from cpmbee.export.weights import StoredTensor, scaled
from cpmbee.model.tensor_names import EMBEDDING

if TYPE_CHECKING:
    from cpmbee.export.balance import Balance, Factors
    from cpmbee.export.plain_quantize import expand, quantize, widen
else:
    try:
        from cpmbee._quantize import expand, quantize, widen
    except ImportError:
        from cpmbee.export.plain_quantize import expand, quantize, widen
        from cpmbee.plain import warn_not_built

        warn_not_built()

Method = Literal["nearest", "search"]
METHODS: tuple[Method, ...] = ("nearest", "search")
DEFAULT_BLOCK_SIZE = 64
DEFAULT_HEAD_BITS = 8  # of int4 models, too: the head costs little and decides every token
PANEL_BYTES = 1 << 20  # of fp32 rows that are quantized at a time
CORRECTED_PANEL_BYTES = 32 << 20  # where corrections are products with all inputs' moments

# Candidates for the number that a block's extreme becomes (`plain_quantize.quantize`). The first is round-to-nearest;
# the others were picked greedily for normal and heavy-tailed weights in blocks of 32, 64 and 128. At 4 bits a little
# clipping pays, and so does giving the extreme the odd number out, -8; more candidates gain less than 1 %.
#
# The search weighs all weights alike. On draws of the demo model (`cpmbee.bench.draws`) nothing that a checkpoint says
# about a matrix's inputs lowers its divergence beyond noise: not the weights of the norm before it, nor more weight for
# large weights, nor even the true mean squares of the inputs. The nearest numbers to a block are on average shorter
# than the block, by 1 % at 4 bits; scales that make up for it spare the sure tokens some 5 % and cost the doubtful ones
# as much.
LEVELS = {4: (7.0, -8.5, -8.0, -9.25), 8: (127.0, -128.0)}

Array = NDArray[Any]


@dataclass(frozen=True)
class Quantization:
    """How an export quantizes.

    Attributes:
        body_bits: of attention and feed-forward matrices.
        head_bits: of the embedding, which is the head as well.
        block_size: inputs that share a scale.
        method: "nearest" rounds to the nearest number on a scale that the largest weight of a block sets; "search"
            picks each block's scale for the least squared error.
        calibration: tells the moments of a matrix's inputs, by the name of its first checkpoint tensor; "search" then
            corrects errors of attention and feed-forward matrices (`cpmbee.export.error_feedback`).
        balance: evens out channels first; None leaves them as they are.
        exact_layers: layers whose products take activations as they are, not rounded to int8.
    """

    body_bits: int
    head_bits: int
    block_size: int
    method: Method = "search"
    calibration: Callable[[str], Moments] | None = field(default=None, repr=False)
    balance: Balance | None = field(default=None, repr=False)
    exact_layers: frozenset[int] = frozenset()

    def matrix(
        self, name: str, sources: tuple[str, ...], dim_in: int, dims_out: tuple[int, ...], factor: float, bits: int
    ) -> QuantizedMatrix:
        """Linear layers with one input as one quantized matrix, times ``factor``."""
        layout = BlockFormat(bits, self.block_size)
        body = sources[0] != EMBEDDING
        calibration, balance = (self.calibration, self.balance) if body else (None, None)
        matrix = QuantizedMatrix(name, sources, dim_in, dims_out, factor, layout, self.method, calibration, balance)
        matrix.exact_activations = any(name.startswith(f"layers.{layer}.") for layer in self.exact_layers)
        return matrix


class QuantizedMatrix:
    """One quantized matrix of the file: two stored tensors that one pass over the checkpoint makes.

    Attributes:
        name: in the graph; ``<name>`` holds the bytes and ``<name>/scales`` the scales.
        sources: checkpoint tensors, one below the other.
        dim_in: their inputs.
        dims_out: their outputs.
        factor: that the graph's matrix has over the checkpoint's.
        layout: bits and block size.
        weight: the bytes.
        scales: their scales, known once the bytes have been made.
        error: relative RMS error of the matrix, of its outputs where it was calibrated; None before.
        exact_activations: whether it multiplies activations that are not rounded.
    """

    def __init__(
        self,
        name: str,
        sources: tuple[str, ...],
        dim_in: int,
        dims_out: tuple[int, ...],
        factor: float,
        layout: BlockFormat,
        method: Method,
        calibration: Callable[[str], Moments] | None,
        balance: Balance | None,
    ) -> None:
        self.name = name
        self.sources = sources
        self.dim_in = dim_in
        self.dims_out = dims_out
        self.factor = factor
        self.layout = layout
        self.error: float | None = None
        self.exact_activations = False
        self._method = method
        self._calibration = calibration
        self._balance = balance
        self._scales: list[Array] = []
        shapes = layout.weight_shape(self.dim_out, dim_in), layout.scales_shape(self.dim_out, dim_in)
        self.weight = StoredTensor(name, shapes[0], np.dtype(np.uint8), sources, self._make)
        self.scales = StoredTensor(f"{name}/scales", shapes[1], np.dtype(np.float16), (), self._made_scales)

    @property
    def dim_out(self) -> int:
        """Outputs, the padding not counted."""
        return sum(self.dims_out)

    def _make(self, tensors: Sequence[Array]) -> Iterator[Uint8]:
        """The bytes, panel by panel."""
        rows, columns = self.layout.padded(self.dim_out, self.dim_in)
        panel_bytes = PANEL_BYTES if self._calibration is None else CORRECTED_PANEL_BYTES
        step = max(LANES, panel_bytes // (4 * columns) // LANES * LANES)
        ones = np.ones(columns, np.float32)
        factors = self._factors()
        moments = None if self._calibration is None else self._calibration(self.sources[0])
        if moments is not None and factors is not None:
            moments = Moments(
                moments.squares * np.square(reciprocal(factors.columns)), moments.factor * factors.columns
            )
        buffers = threading.local()

        def panel(start: int) -> Quantized:
            if not hasattr(buffers, "values"):  # the padding stays zero
                buffers.values = np.zeros((min(step, rows), columns), np.float32)
            values = buffers.values[: rows - start]
            copy_rows(tensors, start, self.factor, values[:, : self.dim_in])
            if factors is not None:
                factors.apply(values, start)
            if moments is not None:
                return quantize_corrected(values, moments, self.layout, self.block_scales)
            return self.rounded(values, ones)

        error = power = 0.0
        self._scales.clear()
        for made in in_order(panel, range(0, rows, step)):
            self._scales.append(made.scales)
            error += made.error
            power += made.power
            yield made.packed
        self.error = float(np.sqrt(error / power)) if power else 0.0

    def _factors(self) -> Factors | None:
        """What balance multiplies the matrix by."""
        if self._balance is None:
            return None
        parts = [self._balance.factors(name) for name in self.sources]  # columns are the same: they read one input
        return parts[0]._replace(rows=np.concatenate([part.rows for part in parts]))

    def rounded(self, values: Float32, importance: Float32) -> Quantized:
        """Rows whose blocks are rounded one by one."""
        search = self._method == "search"
        levels = np.array(LEVELS[self.layout.bits][: None if search else 1], np.float32)
        return Quantized(*quantize(values, importance, self.layout.bits, self.layout.block_size, levels, search))

    def block_scales(self, block: Float32, importance: Float32) -> Float16:
        """Scales of one block of inputs, (rows,)."""
        scales: Float16 = self.rounded(block, importance).scales.reshape(-1)
        return scales

    def _made_scales(self, tensors: Sequence[Array]) -> Iterator[Array]:
        yield from self._scales
        self._scales.clear()


def reciprocal(values: Float32) -> Float32:
    """One over values, exact for powers of two."""
    inverse: Float32 = np.reciprocal(values)
    return inverse


def copy_rows(tensors: Sequence[Array], start: int, factor: float, out: Float32) -> None:
    """Rows from ``start`` on of matrices that lie one below the other, times ``factor``; zeros behind the last."""
    first = 0  # row of the whole where the tensor begins
    for tensor in tensors:
        begin, end = max(start, first), min(start + len(out), first + len(tensor))
        if begin < end:
            rows, place = tensor[begin - first : end - first], out[begin - start : end - start]
            if rows.dtype == np.float16 and rows.flags.c_contiguous:
                widen(rows.view(np.uint16), factor, place)
            else:
                place[:] = scaled(rows, factor, np.dtype(np.float32))
        first += len(tensor)
    out[max(0, first - start) :] = 0


class StoredMatrix(NamedTuple):
    """A quantized matrix of a file.

    Attributes:
        packed: its bytes.
        scales: its scales.
        layout: bits and block size.
        dim_in: its inputs, without padding.
        factor: that it has over what is wanted.
    """

    packed: Uint8
    scales: Float16
    layout: BlockFormat
    dim_in: int
    factor: float = 1.0

    def rows(self, start: int, end: int) -> Float32:
        """Some of its rows over the factor, fp32, made on all cores."""
        values = np.empty((end - start, self.dim_in), np.float32)

        def panel(row: int) -> None:
            self.write(row, values[row - start : row - start + self.panel_rows])

        for _ in in_order(panel, range(start, end, self.panel_rows)):
            pass
        return values

    @property
    def panel_rows(self) -> int:
        """Rows that fit into `PANEL_BYTES` of fp32."""
        return max(1, PANEL_BYTES // (4 * self.dim_in))

    def block_scales(self, start: int, count: int) -> Float32:
        """Scales of some rows, (count, blocks)."""
        groups = self.scales[start // LANES : -(-(start + count) // LANES)].astype(np.float32)
        by_row: Float32 = groups.transpose(0, 2, 1).reshape(len(groups) * LANES, -1)
        return by_row[start % LANES :][:count]

    def write(self, start: int, out: Float32) -> None:
        """Write its rows from ``start`` on, over the factor."""
        first = start // LANES
        groups = slice(first, -(-(start + len(out)) // LANES))
        skipped = start - first * LANES
        whole = np.empty((skipped + len(out), self.dim_in), np.float32) if skipped else out
        expand(self.packed[groups], self.scales[groups].view(np.uint16), self.layout.bits, whole)
        if skipped or self.factor != 1.0:
            np.divide(whole[skipped:], np.float32(self.factor), out=out)
