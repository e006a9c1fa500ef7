"""Does a model folder compute what its checkpoint means? Compared with the PyTorch reference, in the engine's own way.

Logits are compared call by call (a prompt, cached steps after it, a padded batch), then whole answers, greedy and with
beams, through the engine: with the native kernels, and with the function bodies of the file. Without torch the
reference cannot run: native kernels and function bodies are then compared with each other, and the report says so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpmbee import native
from cpmbee.engine import Engine
from cpmbee.errors import ExportError
from cpmbee.export.answers import Answers, NoisyBackend, compare_answers, write_answers
from cpmbee.export.comparison import TOLERANCE, Call, record, replay
from cpmbee.export.memory import available_memory, fp32_bytes
from cpmbee.export.onnx_model import OnnxModel
from cpmbee.export.probes import Probe, make_probes, make_requests
from cpmbee.export.report import Check, VerificationReport
from cpmbee.export.sources import HashedSource, TensorSource, open_source
from cpmbee.export.weights import Precision
from cpmbee.folder import MANIFEST, ModelFolder, open_folder
from cpmbee.tokenizer import Tokenizer

if TYPE_CHECKING:
    from cpmbee.model import CpmBee
    from cpmbee.model.lora import LoraDelta

Progress = Callable[[str, float], None]

STEPS = 4  # cached tokens after each prompt
CACHE_ROWS = 2048
COPIES = 4  # of the weights in fp32, the most that comparing everything holds: reference, widened file, packed file
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
    subject = _Subject(open_folder(folder, verify_hashes=True))
    source = open_source(checkpoint, lora, lora_alpha)
    checks = [
        Check("files", True, f"all files have the sizes and hashes in {MANIFEST}"),
        _check_source(subject.model, source),
    ]
    if not subject.requests:
        detail = "the model's bias table is too small for the segments of any request"
        checks.append(Check("requests", False, detail))
    if not all(check.passed for check in checks):
        return VerificationReport(tuple(checks), ("nothing else was compared",), time.perf_counter() - started)
    tell("running the reference", 0.1)
    expected, notes = _expect(subject, source)
    kinds = [FUNCTIONS] if expected.by != FUNCTIONS else []
    if native.library_path() is None:
        notes.append("native kernels not compared: the op library is not built, or CPMBEE_NATIVE=0 switches it off")
    else:
        kinds.insert(0, NATIVE)
    for n, kind in enumerate(kinds):
        tell(f"running the {kind}", (n + 1) / (len(kinds) + 1))
        checks += _compare(subject, expected, kind)
    tell("verified", 1.0)
    return VerificationReport(tuple(checks), tuple(notes), time.perf_counter() - started)


class _Subject:
    """The folder under examination, and what it is asked.

    Attributes:
        model: the folder.
        requests: those that the model can encode.
        frugal: memory is short, so that nothing may hold a second copy of the weights.
    """

    def __init__(self, model: ModelFolder) -> None:
        self.model = model
        self.frugal = False
        self._tokenizer = Tokenizer.from_file(model.vocabulary)
        self._all = make_requests(self._tokenizer)
        encodable = {probe.name for probe in self.probes()}
        self.requests = [request for request in self._all if request.name in encodable]

    def probes(self) -> list[Probe]:
        """Fresh probes; recording writes tokens into them."""
        return make_probes(self._all, self._tokenizer, self.model.config, STEPS)

    def onnx_model(self, kind: str) -> OnnxModel:
        """A session on the folder for comparing logits."""
        use_native = kind == NATIVE
        return OnnxModel(self.model.model, self.model.config, CACHE_ROWS, use_native=use_native, frugal=self.frugal)

    def engine(self, kind: str) -> Engine:
        """An engine on the folder."""
        return Engine.from_pretrained(self.model.path, "cpu", cache_tokens=CACHE_ROWS, native=kind == NATIVE)

    def reference_engine(self, model: CpmBee, noise: float = 0.0) -> Engine:
        """The engine's searches on the reference."""
        from cpmbee.export.reference import ReferenceBackend

        backend = ReferenceBackend(model, CACHE_ROWS)
        return Engine(NoisyBackend(backend, noise) if noise else backend, self._tokenizer)


@dataclass
class _Expected:
    """What the folder is compared with.

    Attributes:
        by: who computed it.
        calls: calls of the graph with their logits.
        answers: whole answers, and the reference that wrote them; None where only logits can be compared.
    """

    by: str
    calls: list[Call]
    answers: tuple[Answers, CpmBee] | None = None


def _expect(subject: _Subject, source: TensorSource) -> tuple[_Expected, list[str]]:
    """The best reference that this machine can run, and notes on what it leaves out."""
    try:
        import torch  # noqa: F401
    except ImportError:
        calls = record(subject.onnx_model(FUNCTIONS), subject.probes(), STEPS)
        return _Expected(FUNCTIONS, calls), ["PyTorch reference not run: torch is not installed"]
    from cpmbee.export.reference_loading import ReferenceModel, few_threads, load_reference, record_streamed

    precision: Precision = "fp16" if subject.model.precision.get("embedding") == "fp16" else "fp32"
    needed, available = COPIES * fp32_bytes(subject.model.config), available_memory()
    if needed > available:
        subject.frugal = True
        note = (
            "only logits of prompts were compared, the reference running one layer at a time: cached steps and answers "
            f"need {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available"
        )
        with few_threads(subject.model.config):
            return _Expected(REFERENCE, record_streamed(source, precision, subject.probes())), [note]
    model = load_reference(source, precision)
    with few_threads(subject.model.config):
        calls = record(ReferenceModel(model, CACHE_ROWS), subject.probes(), STEPS)
        answers = write_answers(subject.reference_engine(model), subject.requests)
    return _Expected(REFERENCE, calls, (answers, model)), []


def _compare(subject: _Subject, expected: _Expected, kind: str) -> list[Check]:
    """Logits and, where they are known, answers."""
    checks = replay(subject.onnx_model(kind), expected.calls, kind, expected.by)
    if expected.answers is not None:
        answers, model = expected.answers
        error = min(TOLERANCE, max(check.error or 0.0 for check in checks))
        noisy = subject.reference_engine(model, noise=2 * error)
        checks += compare_answers(subject.engine(kind), subject.requests, answers, noisy, kind)
    return checks


def _check_source(model: ModelFolder, source: TensorSource) -> Check:
    """Whether the checkpoint is the one that was exported."""
    manifest = json.loads((model.path / MANIFEST).read_text(encoding="utf-8"))
    same = manifest.get("source", {}).get("sha256") == HashedSource(source).hexdigest()
    found = "the one" if same else "not the one"
    return Check("source", same, f"the checkpoint, with its LoRA delta if any, is {found} that was exported")
