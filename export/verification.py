"""Does a model folder compute what its checkpoint means? Compared with the PyTorch reference, in the engine's own way.

Logits are compared call by call (a prompt, cached steps after it, a padded batch), with the native kernels and with the
function bodies of the file; then whole answers, greedy and with beams, through the engine. Without torch the reference
cannot run: the native kernels and the function bodies are then compared with each other, and the report says so.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from cpmbee import native
from cpmbee.config import ModelConfig
from cpmbee.errors import ExportError
from cpmbee.export.comparison import Call, record, replay
from cpmbee.export.integrity import check_files, read_manifest
from cpmbee.export.memory import available_memory, fp32_bytes
from cpmbee.export.onnx_model import OnnxModel
from cpmbee.export.probes import Probe, make_probes, make_requests
from cpmbee.export.report import Check, VerificationReport
from cpmbee.export.sources import HashedSource, open_source
from cpmbee.tokenizer import Tokenizer

if TYPE_CHECKING:
    from cpmbee.model import CpmBee
    from cpmbee.model.lora import LoraDelta

Progress = Callable[[str, float], None]

STEPS = 6  # cached tokens after each prompt
CACHE_ROWS = 4096
REFERENCE, NATIVE, FUNCTIONS = "PyTorch reference", "native kernels", "function bodies"


def verify(
    folder: str | Path,
    checkpoint: str | Path | CpmBee,
    *,
    lora: str | Path | LoraDelta | None = None,
    lora_alpha: float | None = None,
    progress: Progress | None = None,
) -> VerificationReport:
    """Compare a model folder with the checkpoint it was exported from.

    Args:
        folder: the model folder.
        checkpoint: what it was exported from, as in `cpmbee.export.export`.
        lora: the delta that was merged, if any.
        lora_alpha: its alpha.
        progress: is told what is being done and how much of it is done, from 0 to 1.

    Raises:
        ExportError: a comparison does not hold; names it.
        ModelFolderError: the folder is incomplete or altered; names the file.
        CheckpointError: the checkpoint or the delta cannot be read.
    """
    report = examine(folder, checkpoint, lora=lora, lora_alpha=lora_alpha, progress=progress)
    require_passed(folder, report)
    return report


def require_passed(folder: str | Path, report: VerificationReport) -> None:
    """Refuse a folder with a comparison that does not hold.

    Raises:
        ExportError: names the first one.
    """
    for check in report.checks:
        if not check.passed:
            raise ExportError(f"{folder}: verification does not hold: {check.name}: {check.detail}")


def examine(
    folder: str | Path,
    checkpoint: str | Path | CpmBee,
    *,
    lora: str | Path | LoraDelta | None = None,
    lora_alpha: float | None = None,
    progress: Progress | None = None,
) -> VerificationReport:
    """Like `verify`, but a comparison that does not hold is only reported."""
    started = time.perf_counter()
    tell = progress or (lambda stage, fraction: None)
    tell("checking files", 0.0)
    checks = [check_files(Path(folder))]
    subject = _Subject(Path(folder))
    source = HashedSource(open_source(checkpoint, lora, lora_alpha))
    tell("running the reference", 0.1)
    calls = subject.record_reference(source)
    checks.append(subject.check_source(source))
    reference = REFERENCE
    if calls is None:
        reference, calls = FUNCTIONS, record(subject.onnx_model(use_native=False), subject.probes(), STEPS)
    if native.library_path() is None:
        subject.notes.append("native kernels not compared: the op library is not built or is switched off")
    else:
        tell("running the native kernels", 0.4)
        checks += replay(subject.onnx_model(use_native=True), calls, NATIVE, reference)
    if reference != FUNCTIONS:
        tell("running the function bodies", 0.6)
        checks += replay(subject.onnx_model(use_native=False), calls, FUNCTIONS, reference)
    tell("verified", 1.0)
    return VerificationReport(tuple(checks), tuple(subject.notes), time.perf_counter() - started)


@dataclass
class _Subject:
    """The folder under examination.

    Attributes:
        folder: where it is.
        notes: what could not be compared, and why.
        frugal: memory is short, so nothing may hold a second copy of the weights.
    """

    folder: Path
    notes: list[str] = field(default_factory=list)
    frugal: bool = False

    @cached_property
    def config(self) -> ModelConfig:
        """The folder's model configuration."""
        return ModelConfig.from_file(self.folder / "config.json")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer."""
        return Tokenizer.from_file(self.folder / "vocab.txt")

    def probes(self) -> list[Probe]:
        """Fresh probes; recording writes tokens into them."""
        return make_probes(make_requests(self.tokenizer), self.tokenizer, self.config, STEPS)

    def onnx_model(self, *, use_native: bool) -> OnnxModel:
        """A session on the folder."""
        model_file = self.folder / "model.onnx"
        return OnnxModel(model_file, self.config, CACHE_ROWS, use_native=use_native, frugal=self.frugal)

    def record_reference(self, source: HashedSource) -> list[Call] | None:
        """What the reference computes, or None where it cannot run."""
        if importlib.util.find_spec("torch") is None:
            self.notes.append("PyTorch reference not run: torch is not installed")
            return None
        from cpmbee.export.reference_loading import ReferenceModel, load_reference, record_streamed

        precision = read_manifest(self.folder)["precision"]["embedding"]
        needed, available = fp32_bytes(self.config), available_memory()
        if 2 * needed > available:
            self.frugal = True
            self.notes.append(
                f"cached steps, batches and answers not compared: the reference needs {needed / 1e9:.1f} GB and "
                f"{available / 1e9:.1f} GB are available, so it ran one layer at a time, on prompts only"
            )
            return record_streamed(source, precision, self.probes())
        return record(ReferenceModel(load_reference(source, precision), CACHE_ROWS), self.probes(), STEPS)

    def check_source(self, source: HashedSource) -> Check:
        """Whether the checkpoint is the one that was exported."""
        same = source.hexdigest() == read_manifest(self.folder)["source"]["sha256"]
        detail = "the checkpoint is the one that was exported"
        return Check(
            "source", same, detail if same else "the folder was exported from another checkpoint or LoRA delta"
        )
