"""NumPy's side of tensors: their dtypes, and numbers mapped from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmbee.errors import CheckpointError, DependencyError

Array = npt.NDArray[Any]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a tensor dtype's name.

    Raises:
        DependencyError: ``bfloat16`` without the package that brings it to NumPy.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ModuleNotFoundError:
        raise DependencyError('bfloat16 tensors need ml_dtypes: pip install "cpmbee[export]"') from None
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def map_bytes(path: Path, name: str, begin: int, size: int) -> Array:
    """A copy-on-write map of a part of a file, uint8[size]; neither alignment nor dtype matter.

    Args:
        path: of the file.
        name: of the tensor that lies there, for messages.
        begin: offset in the file.
        size: bytes.

    Raises:
        CheckpointError: the file has become shorter, or cannot be opened any more.
    """
    try:
        return np.asarray(np.memmap(path, np.uint8, "c", begin, (size,)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot read {name} ({error})") from None


def unsupported_dtype(path: Path, name: str, dtype: str) -> CheckpointError:
    """The error of a tensor of another dtype than a checkpoint's."""
    return CheckpointError(f"{path}: {name} has dtype {dtype}; float32, float16 and bfloat16 can be read")
