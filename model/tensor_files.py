"""Files of named tensors, read one tensor at a time: safetensors without torch, torch's own format safely.

Nothing here knows about CPM-Bee. A file is checked when it is opened (header, shapes against file size), and memory is
taken only when a tensor is read.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from cpmbee.errors import CheckpointError, DependencyError

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]

_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ZIP_MAGIC = b"PK\x03\x04"


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
        """One tensor, memory-mapped where the format allows it; bfloat16 comes as ``ml_dtypes.bfloat16``."""


def open_tensor_file(path: Path) -> TensorFile:
    """Open a ``.safetensors`` file, or anything else as a file of ``torch.save``.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or holds something other than float tensors.
        DependencyError: the package that reads this format is not installed.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a tensor dtype's name.

    Raises:
        DependencyError: ``bfloat16`` without the package that brings it to NumPy.
    """
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        raise DependencyError('bfloat16 tensors need ml_dtypes: pip install "cpmbee[export]"') from None
    dtype: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return dtype


def needs_torch(what: str) -> DependencyError:
    """The error of a call that cannot do without torch where torch is not installed."""
    return DependencyError(f'{what} needs torch: pip install "cpmbee[torch]" (reading .safetensors files does not)')


class SafetensorsFile:
    """A safetensors file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise DependencyError(f'{path}: reading it needs safetensors: pip install "cpmbee[export]"') from None
        self.path = path
        try:
            # The package checks the header's length, and that the tensors cover the file exactly and do not overlap.
            with safe_open(path, framework="numpy"):
                pass
            with path.open("rb") as file:
                header_size = int.from_bytes(file.read(8), "little")
                header: dict[str, Any] = json.loads(file.read(header_size))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged or not a safetensors file ({_one_line(error)})") from None
        header.pop("__metadata__", None)
        self._data_start = 8 + header_size
        self._entries = header
        for name, entry in header.items():
            if entry["dtype"] not in _SAFETENSORS_DTYPES:
                raise _unsupported_dtype(path, name, entry["dtype"])

    def names(self) -> list[str]:
        """Names of the tensors, in file order."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> str:
        """``float32``, ``float16`` or ``bfloat16``."""
        return _SAFETENSORS_DTYPES[self._entries[name]["dtype"]]

    def read(self, name: str) -> Array:
        """One tensor as a copy-on-write map of the file."""
        dtype, shape = numpy_dtype(self.dtype(name)), self.shape(name)
        if 0 in shape:
            return np.empty(shape, dtype)
        offset = self._data_start + self._entries[name]["data_offsets"][0]
        # Mapped as bytes: neither the alignment of the offset nor NumPy's knowledge of the dtype matters.
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        try:
            raw = np.memmap(self.path, np.uint8, "c", offset, (size,))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: cannot read {name} ({_one_line(error)})") from None
        return np.asarray(raw).view(dtype).reshape(shape)


class TorchFile:
    """A state dict written by ``torch.save``; loaded without running code from the file.

    Files of the zip format (torch 1.6 and later) are memory-mapped, older ones are read whole.
    """

    def __init__(self, path: Path) -> None:
        try:
            import torch
        except ImportError:
            raise needs_torch(f"{path}: reading it") from None
        self.path = path
        try:
            with path.open("rb") as file:
                mappable = file.read(4) == _ZIP_MAGIC
            state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
        except pickle.UnpicklingError as error:
            # Torch reports a damaged pickle and one with forbidden objects by the same class.
            raise CheckpointError(
                f"{path}: damaged, or holds objects other than tensors, which are refused because loading them can "
                f"run code ({_one_line(error)})"
            ) from None
        except Exception as error:  # whatever a damaged archive makes torch's readers raise
            raise CheckpointError(f"{path}: damaged or not a torch file ({_one_line(error)})") from None
        if not isinstance(state, dict):
            raise CheckpointError(f"{path}: holds a {type(state).__name__}, expected a dict of tensors")
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor):
                raise CheckpointError(
                    f"{path}: {name!r} is a {type(value).__name__}; expected a flat dict of named tensors"
                )
            if _torch_dtype_name(value) not in _SAFETENSORS_DTYPES.values() or value.layout != torch.strided:
                raise _unsupported_dtype(path, name, f"{value.layout}/{value.dtype}")
            if value.is_meta:
                raise CheckpointError(f"{path}: {name} was saved without its data (on the meta device)")
            if value.untyped_storage().nbytes() < value.nbytes:  # one number, repeated: reading it would spread it out
                raise CheckpointError(f"{path}: {name} holds fewer numbers than its shape {tuple(value.shape)} has")
        self._tensors: dict[str, torch.Tensor] = state

    def names(self) -> list[str]:
        """Names of the tensors, in file order."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        """``float32``, ``float16`` or ``bfloat16``."""
        return _torch_dtype_name(self._tensors[name])

    def read(self, name: str) -> Array:
        """One tensor, a view of the mapped file."""
        import torch

        tensor = self._tensors[name].detach().contiguous()
        if tensor.dtype == torch.bfloat16:  # unknown to torch's NumPy bridge
            bits: Array = tensor.view(torch.int16).numpy()
            return bits.view(numpy_dtype("bfloat16"))
        array: Array = tensor.numpy()
        return array


def _torch_dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _unsupported_dtype(path: Path, name: str, dtype: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name} has dtype {dtype}; float32, float16 and bfloat16 can be read")


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
