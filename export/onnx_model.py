"""An exported model folder behind the same small interface as the reference, for comparisons only.

The engine has its own, faster way to run a folder; this one takes plain arrays, any optimization level, and either the
native kernels or the function bodies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cpmbee import native
from cpmbee.cache_types import CacheArrays
from cpmbee.export.probes import GraphInputs
from cpmbee.machine import physical_cores
from cpmbee.onnxruntime_import import import_onnxruntime

if TYPE_CHECKING:
    import onnxruntime as ort
else:
    ort = import_onnxruntime()


class OnnxModel:
    """A session with its own cache of token rows.

    Args:
        model: ``model.onnx``, its data file beside it.
        cache_rows: rows of the cache, row 0 (scratch) not counted.
        use_native: with the native kernels, or with the function bodies in the file.
        num_threads: of one run; 0 takes one for each physical core.
        level: how far ONNX Runtime optimizes the graph.
    """

    def __init__(
        self,
        model: Path,
        cache_rows: int,
        *,
        use_native: bool,
        num_threads: int = 0,
        level: ort.GraphOptimizationLevel = ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    ) -> None:
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        options.intra_op_num_threads = num_threads or physical_cores()
        options.log_severity_level = 3
        if use_native:
            native.register(options)
        self.use_native = use_native
        self._session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._caches = CacheArrays(self._session).zeros(cache_rows + 1)

    def run_all(self, inputs: Sequence[GraphInputs]) -> Iterator[NDArray[np.float32]]:
        """Logits (B, R, V + E) of one call after the other."""
        return map(self.run, inputs)

    def run(self, inputs: GraphInputs) -> NDArray[np.float32]:
        """Logits (B, R, V + E); the new tokens' keys and values go into the cache."""
        names = ["logits", *(f"present_{name}" for name in self._caches)]
        logits, *presents = self._session.run(names, {**inputs._asdict(), **self._caches})
        self._caches = dict(zip(self._caches, presents, strict=True))
        result: NDArray[np.float32] = logits
        return result
