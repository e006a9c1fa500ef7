"""What rounding activations costs in each layer, and the layers where it costs too much.

The exported model runs with exact products, and then once for each layer with the activations of that layer alone
rounded. Nearly all models spread these errors over their layers; where one stands out, channels far above the others
are to blame that could not be evened out (`cpmbee.export.balance`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from cpmbee.config import ModelConfig
from cpmbee.export.comparison import plan
from cpmbee.export.exact_model import ExactModel
from cpmbee.export.probes import make_probes, make_requests
from cpmbee.export.rounded_model import rounded_activations
from cpmbee.tokenizer import Tokenizer

OUTLYING = 30.0  # times the median of all layers: a layer whose squared error is larger needs exact activations


def layer_errors(model_file: Path, config: ModelConfig, tokenizer: Tokenizer) -> list[float]:
    """Mean squared error of logits, for each layer, where its activations are rounded and no others.

    Args:
        model_file: ``model.onnx``, its data file beside it.
        config: the model.
        tokenizer: its own.
    """
    batch = plan(make_probes(make_requests(tokenizer), tokenizer, config, 0), 0)[-1].inputs
    (exact,) = ExactModel(model_file).run_all([batch])
    errors = []
    for layer in range(config.num_hidden_layers):
        (rounded,) = _OneLayer(model_file, layer).run_all([batch])
        errors.append(float(np.square(rounded - exact, dtype=np.float64).mean()))
    return errors


def layers_that_need_exact(model_file: Path, config: ModelConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """Layers whose activations should not be rounded; see `layer_errors`."""
    errors = np.array(layer_errors(model_file, config, tokenizer))
    usual = float(np.median(errors[errors > 0])) if (errors > 0).any() else 0.0
    return frozenset(np.nonzero(errors > OUTLYING * usual)[0].tolist())


class _OneLayer(ExactModel):
    """A model that rounds the activations of one layer."""

    def __init__(self, model_file: Path, layer: int) -> None:
        self._scope = f"layers.{layer}."
        super().__init__(model_file)

    def _activations(self, node: onnx.NodeProto) -> tuple[str, list[onnx.NodeProto]]:
        return rounded_activations(node) if node.output[0].startswith(self._scope) else super()._activations(node)
