"""Files of named tensors, read one tensor at a time and without running code from them; torch is not needed.

Nothing here knows about CPM-Bee. A file is checked when it is opened (header, shapes against file size), and memory is
taken only when a tensor is read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from cpmbee.errors import CheckpointError, DependencyError
from cpmbee.model.arrays import Array, numpy_dtype
from cpmbee.model.safetensors_file import SafetensorsFile
from cpmbee.model.torch_file import TorchFile

__all__ = ["Array", "TensorFile", "needs_torch", "numpy_dtype", "open_tensor_file"]


class TensorFile(Protocol):
    """An open file of named tensors."""

    path: Path

    def names(self) -> list[str]:
        """Names of the tensors, in file order."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""

    def dtype(self, name: str) -> str:
        """``float32``, ``float16`` or ``bfloat16``."""

    def read(self, name: str) -> Array:
        """One tensor, memory-mapped where its numbers lie in order; bfloat16 comes as ``ml_dtypes.bfloat16``."""


def open_tensor_file(path: Path) -> TensorFile:
    """Open a ``.safetensors`` file, or anything else as a file of ``torch.save``.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or holds something other than float tensors.
    """
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: no such file")
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def needs_torch(what: str) -> DependencyError:
    """The error of a call that cannot do without torch where torch is not installed."""
    return DependencyError(f'{what} needs torch: pip install "cpmbee[torch]" (reading checkpoints does not)')
