"""The compiled op library: registering it with ONNX Runtime, and saying which of its kernels are active.

A model file runs without it, on function bodies made of standard operators; with it, the ops it has kernels for run
natively. A silent fallback would only show as a slow engine, so what runs can be asked here.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cpmbee.errors import ConfigError
from cpmbee.onnxruntime_import import release
from cpmbee.plain import warn_not_built

if TYPE_CHECKING:
    import onnxruntime

OPS = (
    "AddRMSNorm",
    "BucketedAttention",
    "BucketedPositionBias",
    "GatedGelu",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RMSNorm",
    "SubscriptRotation",
)
_EIGHT_BITS = (1, 22)  # the first ONNX Runtime whose MatMulNBits takes them
# A cap goes by this order; a machine has those of its own architecture.
ISA_NAMES = ("scalar", "neon", "avx2", "avx512")


def library_path() -> Path | None:
    """The op library, or None when it was never built or ``CPMBEE_NATIVE=0`` turns it off."""
    if os.environ.get("CPMBEE_NATIVE") == "0":
        return None
    path = Path(__file__).with_name("_ops.dll" if sys.platform == "win32" else "_ops.so")
    if path.is_file():
        return path
    warn_not_built()
    return None


def register(session_options: onnxruntime.SessionOptions) -> None:
    """Make sessions with these options run the native kernels; without the library, do nothing.

    Raises:
        ConfigError: ``CPMBEE_ISA`` is not the name of an instruction set.
    """
    path = library_path()
    if path is not None:
        _check_isa()
        session_options.register_custom_ops_library(str(path))


def why_no_bodies(precisions: Iterable[str], version: str) -> str | None:
    """Why a model cannot run on its function bodies, without native kernels; None where it can.

    Args:
        precisions: storage types of its tensors.
        version: ONNX Runtime's.
    """
    if "int8" not in precisions or release(version) >= _EIGHT_BITS:
        return None
    return (
        f"ONNX Runtime {version} does not know the 8-bit product of the model's function bodies (MatMulNBits); "
        "it takes 1.22 or newer, or the native kernels"
    )


def kernels() -> dict[str, str]:
    """What each op runs with: ``avx512``, ``avx2``, ``neon`` or ``scalar`` natively, else ``function``.

    ``-vnni`` or ``-dotprod`` after it says that bytes are multiplied and added in one instruction.
    """
    library = _library()
    if library is None:
        return dict.fromkeys(OPS, "function")
    return {name: library.cpmbee_op_kernel(i).decode() for i, name in enumerate(_op_names(library))}


def call_counts() -> dict[str, int]:
    """How often each op's native kernel has run in this process; zeros without the library."""
    library = _library()
    if library is None:
        return dict.fromkeys(OPS, 0)
    counts: Counter[str] = Counter()  # an op may have several kernels, by the types of its inputs
    for i, name in enumerate(_op_names(library)):
        counts[name] += library.cpmbee_op_calls(i)
    return dict(counts)


def cap_isa(name: str) -> None:
    """Let the kernels of this process use at most the instruction set ``name``, whatever ``CPMBEE_ISA`` says.

    Raises:
        ConfigError: there is no instruction set of that name.
    """
    if name not in ISA_NAMES:
        raise ConfigError(f"instruction set must be one of {', '.join(ISA_NAMES)}, not {name!r}")
    library = _library()
    if library is not None:
        library.cpmbee_cap_isa(name.encode())


def _check_isa() -> None:
    name = os.environ.get("CPMBEE_ISA", ISA_NAMES[-1])
    if name not in ISA_NAMES:
        raise ConfigError(f"CPMBEE_ISA must be one of {', '.join(ISA_NAMES)}, not {name!r}")


def _library() -> ctypes.CDLL | None:
    path = library_path()
    if path is None:
        return None
    _check_isa()
    return _load(path)


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.cpmbee_op_name.restype = ctypes.c_char_p
    library.cpmbee_op_kernel.restype = ctypes.c_char_p
    library.cpmbee_op_calls.restype = ctypes.c_uint64
    library.cpmbee_cap_isa.argtypes = [ctypes.c_char_p]
    return library


def _op_names(library: ctypes.CDLL) -> list[str]:
    names: list[str] = []
    while name := library.cpmbee_op_name(len(names)):
        names.append(name.decode())
    return names
