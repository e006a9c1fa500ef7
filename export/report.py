"""What an export and its verification found, as values and as ``export_report.json``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: what was compared.
        passed: whether it holds.
        error: the largest difference, relative to the range of the compared values; None where things are simply
            equal or not.
        tolerance: the largest error that passes; None with ``error``.
        detail: what was compared with what, and what is to know about it.
    """

    name: str
    passed: bool
    detail: str
    error: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class VerificationReport:
    """All comparisons of one verification.

    Attributes:
        checks: in the order they were made.
        notes: what was not compared, and why.
        seconds: it took.
    """

    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"passed": self.passed, **asdict(self)}


@dataclass(frozen=True)
class MatrixError:
    """What quantization did to one matrix.

    Attributes:
        name: of the matrix in the graph.
        bits: of its weights.
        error: relative RMS error of its weights; weighted by the strength of its inputs where the export was
            calibrated.
    """

    name: str
    bits: int
    error: float


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        folder: the model folder.
        precision: of the stored matrices.
        num_parameters: values in the stored tensors.
        num_bytes: size of all files.
        source_sha256: hash of the tensors that were read.
        seconds: it took to write, without verification.
        verification: None where it was not asked for.
        matrices: errors of the quantized matrices, in the order of the graph.
    """

    folder: Path
    precision: str
    num_parameters: int
    num_bytes: int
    source_sha256: str
    seconds: float
    verification: VerificationReport | None
    matrices: tuple[MatrixError, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; the folder is left out, for a model folder may be moved."""
        values = {name: value for name, value in asdict(self).items() if name not in ("folder", "verification")}
        return {**values, "verification": None if self.verification is None else self.verification.to_dict()}
