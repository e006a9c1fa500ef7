"""From a trained checkpoint to an ONNX model folder, and the proof that the folder computes the same."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cpmbee.errors import DependencyError

if TYPE_CHECKING:
    from cpmbee.export.exporter import export
    from cpmbee.export.report import Check, ExportReport, VerificationReport
    from cpmbee.export.verification import verify

_HOME = {
    "Check": "report",
    "ExportReport": "report",
    "VerificationReport": "report",
    "export": "exporter",
    "verify": "verification",
}

__all__ = ["Check", "ExportReport", "VerificationReport", "export", "verify"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "onnx":
            raise
        raise DependencyError('exporting needs onnx: pip install "cpmbee[export]"') from None
