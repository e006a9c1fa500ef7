"""What the inputs of each matrix look like while a model reads requests: the knowledge of a calibrated export.

The PyTorch reference reads the requests, one layer in memory at a time and only when the export has come to that layer,
so that any model can be calibrated whose checkpoint can be exported.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cpmbee.errors import ExportError
from cpmbee.export.error_feedback import Moments
from cpmbee.export.reference_loading import embedded, few_threads, layer_steps
from cpmbee.export.sources import TensorSource
from cpmbee.export.transcripts import read_transcripts
from cpmbee.model.layers import Linear
from cpmbee.tokenizer import Tokenizer

DAMPING = 0.01  # of the mean square of the inputs, on the diagonal: for inputs that the requests hardly excite
ROWS = 4096  # inputs that are gathered before their products are taken


class Calibration:
    """Moments of the inputs of matrices, layer by layer.

    Args:
        source: the checkpoint.
        tokenizer: the model's.
        requests: JSON Lines of requests, best with their answers.

    Raises:
        ConfigError: the file has a line that is not a request this model can read.
    """

    def __init__(self, source: TensorSource, tokenizer: Tokenizer, requests: str | Path) -> None:
        self._config = source.config
        inputs = [transcript.inputs for transcript in read_transcripts(requests, tokenizer, source.config)]
        self._gathered: dict[str, _Products] = {}
        self._steps = layer_steps(source, "fp32", inputs, embedded(source, "fp32", inputs), self._watch)

    def moments(self, name: str) -> Moments:
        """Those of the inputs of a linear layer; layers in their order.

        Args:
            name: of its tensor.

        Raises:
            ExportError: the calibration requests make the layer's inputs overflow.
        """
        with few_threads(self._config), torch.no_grad():
            while name not in self._gathered:
                self._gathered.clear()
                next(self._steps)
            try:
                return self._gathered.pop(name).moments()
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # public, but its stub does not say so
                raise ExportError(f"{name}: inputs are too large or no numbers on the calibration requests") from None

    def _watch(self, module: nn.Module, prefix: str) -> None:
        for name, part in module.named_modules():
            if isinstance(part, Linear) and not name.endswith(("project_k", "project_v", "w_1")):  # read as others do
                products = self._gathered[f"{prefix}{name}.weight"] = _Products(part.weight.shape[1])
                part.register_forward_pre_hook(products.add)


class _Products:
    """Sums of products of all pairs of inputs."""

    def __init__(self, dim: int) -> None:
        self._sums = torch.zeros(dim, dim)
        self._waiting: list[Tensor] = []
        self._count = 0

    def add(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """A hook that sees the inputs of a linear layer, (1, Q, inputs)."""
        self._waiting.append(inputs[0].flatten(0, -2))
        if sum(map(len, self._waiting)) >= ROWS:
            self._flush()

    def moments(self) -> Moments:
        """Of everything seen."""
        self._flush()
        means = self._sums / max(1, self._count)
        squares = means.diagonal().clone()
        means.diagonal().add_(DAMPING * squares.mean().clamp_min(torch.finfo(torch.float32).tiny))
        # With the inputs in reverse, means = R * transpose of R with an upper R: its inverse is the factor.
        root = torch.linalg.cholesky(means.flip(0, 1)).flip(0, 1)
        factor = torch.linalg.solve_triangular(root, torch.eye(len(root)), upper=True)
        return Moments(np.asarray(squares), np.asarray(factor))

    def _flush(self) -> None:
        if self._waiting:
            rows = torch.cat(self._waiting)
            self._sums.addmm_(rows.T, rows)
            self._count += len(rows)
            self._waiting.clear()
