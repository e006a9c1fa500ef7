"""Writing files of named tensors; where the disk refuses, an `OSError` says why and names the file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cpmbee.errors import DependencyError
from cpmbee.model.tensor_files import Array, needs_torch

if TYPE_CHECKING:
    import torch


def write_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write PyTorch tensors, each contiguous and alone in its storage, by ``torch.save`` or as ``.safetensors``.

    Raises:
        OSError: the disk refuses; names the file.
        DependencyError: safetensors is not installed.
    """
    if file.suffix == ".bin":
        _save_pickled(tensors, file)
        return
    try:
        from safetensors.torch import save_file
    except ModuleNotFoundError:
        raise _needs_safetensors() from None
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except Exception as error:
        raise _disk_error(error, file) from None


def write_arrays(arrays: Mapping[str, Array], file: Path) -> None:
    """As `write_tensors`, of NumPy arrays; only ``.bin`` needs torch.

    Raises:
        OSError: the disk refuses; names the file.
        DependencyError: the package that writes the format is not installed.
    """
    if file.suffix == ".bin":
        try:
            import torch
        except ModuleNotFoundError:
            raise needs_torch(f"{file}: writing it") from None
        _save_pickled({name: torch.from_numpy(array) for name, array in arrays.items()}, file)
        return
    try:
        from safetensors.numpy import save_file
    except ModuleNotFoundError:
        raise _needs_safetensors() from None
    try:
        save_file(dict(arrays), file, metadata={"format": "pt"})
    except Exception as error:
        raise _disk_error(error, file) from None


def _save_pickled(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    import torch

    try:
        # Into a file of Python's: PyTorch's own says "unexpected pos" where the disk is full, and no reason.
        with file.open("wb") as opened:
            torch.save(dict(tensors), opened)
    except (OSError, RuntimeError) as error:
        raise _disk_error(error, file) from None


def _disk_error(error: BaseException, file: Path) -> BaseException:
    """The error of the operating system behind that of a library; or the latter, where none is behind it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    number = None if cause is None else cause.errno
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):  # as Rust says it
        number = int(found[1])
    return error if number is None else OSError(number, os.strerror(number), str(file))


def _needs_safetensors() -> DependencyError:
    return DependencyError('writing safetensors needs safetensors: pip install "cpmbee[torch]"')
