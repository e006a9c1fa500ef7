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
        error: the largest difference, relative to the range of the compared values, or where both round the squared
            error relative to that of rounding; None where things are simply equal or not.
        tolerance: the largest error that passes; None with ``error``.
        detail: what was compared with what, and what is to know about it.
    """

    name: str
    passed: bool
    detail: str
    error: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class Quality:
    """A model against the reference, over the tokens of answers.

    An answer counts as right when each of its tokens, the end included, is the likeliest one after those before it:
    then greedy search writes it.

    Attributes:
        requests: that were asked.
        positions: tokens of their answers.
        kl: mean Kullback-Leibler divergence of the model's distribution from the reference's, in nats.
        top1: share of positions where both find the same token likeliest.
        accuracy: share of requests that the model answers right; None where not all of them came with answers.
        reference_accuracy: that of the reference.
    """

    requests: int
    positions: int
    kl: float
    top1: float
    accuracy: float | None
    reference_accuracy: float | None

    def __str__(self) -> str:
        text = f"KL {self.kl:.2e} nats, top-1 agreement {100 * self.top1:.2f} % of {self.positions} tokens"
        if self.accuracy is not None and self.reference_accuracy is not None:
            text += (
                f", {100 * self.accuracy:.1f} % of {self.requests} answers right "
                f"(fp32: {100 * self.reference_accuracy:.1f} %)"
            )
        return text


@dataclass(frozen=True)
class VerificationReport:
    """All comparisons of one verification.

    Attributes:
        checks: in the order they were made.
        notes: what was not compared, and why.
        seconds: it took.
        quality: the folder against fp32 on requests of the caller's; None where there were none.
    """

    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    seconds: float
    quality: Quality | None = None

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
        cache: how cache rows are stored.
        num_parameters: values in the stored tensors.
        num_bytes: size of all files.
        source_sha256: hash of the tensors that were read.
        seconds: it took to write, without verification.
        verification: None where it was not asked for.
        matrices: errors of the quantized matrices, in the order of the graph.
    """

    folder: Path
    precision: str
    cache: str
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
