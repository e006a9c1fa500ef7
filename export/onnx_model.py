"""An exported model folder behind the same small interface as the reference, for comparisons only.

The engine has its own, faster way to run a folder; this one takes plain arrays, any optimization level, and either the
native kernels or the function bodies.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from cpmbee import native
from cpmbee.config import ModelConfig
from cpmbee.export.probes import GraphInputs


class OnnxModel:
    """A session with its own cache of token rows.

    Args:
        model: ``model.onnx``, its data file beside it; or its bytes, with ``initializers``.
        config: of the model.
        cache_rows: rows of the cache, row 0 (scratch) not counted.
        use_native: with the native kernels, or with the function bodies in the file.
        level: how far ONNX Runtime optimizes the graph.
        frugal: do not pack a second copy of the weights; slower, for models that barely fit.
        initializers: the tensors of the data file, used where they are.
    """

    def __init__(
        self,
        model: Path | bytes,
        config: ModelConfig,
        cache_rows: int,
        *,
        use_native: bool,
        level: ort.GraphOptimizationLevel = ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        frugal: bool = False,
        initializers: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.log_severity_level = 3
        if frugal:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if use_native:
            native.register(options)
        if initializers is not None:
            self._values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in initializers.items()}
            options.add_external_initializers(list(self._values), list(self._values.values()))
        where = str(model) if isinstance(model, Path) else model
        self._session = ort.InferenceSession(where, options, providers=["CPUExecutionProvider"])
        row = (cache_rows + 1, config.num_attention_heads, config.dim_head)
        self._caches = {
            f"{kind}_cache.{n}": np.zeros(row, np.float32)
            for n in range(len(config.attention_layers))
            for kind in ("key", "value")
        }

    def run(self, inputs: GraphInputs) -> NDArray[np.float32]:
        """Logits (B, R, V + E); the new tokens' keys and values go into the cache."""
        names = ["logits", *(f"present_{name}" for name in self._caches)]
        logits, *presents = self._session.run(names, {**inputs._asdict(), **self._caches})
        self._caches = dict(zip(self._caches, presents, strict=True))
        result: NDArray[np.float32] = logits
        return result
