"""ONNX Runtime, imported when it is first needed."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from cpmbee.errors import DependencyError


def import_onnxruntime() -> Any:
    """ONNX Runtime, which is not a plain dependency because its CPU and GPU builds exclude each other.

    Raises:
        DependencyError: it is missing, or both builds are installed.
    """
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(installed) > 1:
        raise DependencyError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; uninstall both, "
            'then pip install "cpmbee[cpu]" or "cpmbee[gpu]"'
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError(
            f'ONNX Runtime cannot be imported ({error}); pip install "cpmbee[cpu]" brings it'
        ) from None
    return onnxruntime


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
