"""Does a model folder compute what its checkpoint means? Compared with the PyTorch reference, in the engine's own way.

Logits are compared call by call (a prompt, cached steps after it, a padded batch), then whole answers, greedy and with
beams, through the engine: with the native kernels, and with the function bodies of the file. Without torch the
reference cannot run: native kernels and function bodies are then compared with each other, and the report says so.

A quantized folder is compared with the reference on the weights that the file means: closely with exact products
(`cpmbee.export.exact_model`), loosely with those that round activations. A cache in fewer bits is exact in the first
comparison, too, and rounded in the others. How much quantization costs is another
question, and no check: the report's quality answers it, against fp32 and on requests of the caller's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from cpmbee import native
from cpmbee.engine import Engine
from cpmbee.errors import ExportError
from cpmbee.export.answers import Answers, NoisyBackend, compare_answers, write_answers
from cpmbee.export.comparison import (
    CACHE_TOLERANCES,
    ROUNDED_TOLERANCE,
    TOLERANCE,
    Call,
    LogitsModel,
    plan,
    record,
    replay,
)
from cpmbee.export.dequantized import DequantizedSource, check_weights, external_tensors, stored_quantization
from cpmbee.export.exact_model import ExactModel
from cpmbee.export.memory import available_memory, fp32_bytes
from cpmbee.export.onnx_model import OnnxModel
from cpmbee.export.pieces import PiecewiseModel
from cpmbee.export.probes import Probe, make_probes, make_requests
from cpmbee.export.quality import measure
from cpmbee.export.report import Check, Quality, VerificationReport
from cpmbee.export.sources import HashedSource, TensorSource, open_source
from cpmbee.export.transcripts import Transcript, read_transcripts
from cpmbee.export.weights import Precision
from cpmbee.folder import MANIFEST, ModelFolder, open_folder
from cpmbee.model.tensor_names import expected_tensors
from cpmbee.onnxruntime_import import import_onnxruntime
from cpmbee.tokenizer import Tokenizer

if TYPE_CHECKING:
    from cpmbee.model import CpmBee
    from cpmbee.model.lora import LoraDelta

Progress = Callable[[str, float], None]

FEW_REQUESTS = 3  # that a model gets which runs one layer at a time
STEPS = 4  # cached tokens after each prompt
CACHE_ROWS = 2048
LARGE_MODEL_BYTES = 256 << 20  # of fp32 weights, from which on an exact product takes its time
COPIES = 4  # of the weights in fp32, the most that comparing everything holds: reference, widened file, packed file
REFERENCE, NATIVE, FUNCTIONS = "PyTorch reference", "native kernels", "function bodies"


def verify(
    folder: str | Path,
    checkpoint: str | Path | CpmBee,
    *,
    lora: str | Path | LoraDelta | None = None,
    lora_alpha: float | None = None,
    quality: str | Path | None = None,
    progress: Progress | None = None,
) -> VerificationReport:
    """Compare a model folder with the checkpoint it was exported from.

    Args:
        folder: the model folder.
        checkpoint: what it was exported from, as in `cpmbee.export.export`.
        lora: the delta that was merged, if any.
        lora_alpha: its alpha.
        quality: JSON Lines of requests, best with their answers: the report then says how far the folder's
            probabilities are from those of fp32, and how many answers are right.
        progress: is told what is being done and how much of it is done, from 0 to 1.

    Raises:
        ExportError: a comparison does not hold; names it.
        ModelFolderError: the folder is incomplete or altered; names the file.
        CheckpointError: the checkpoint or the delta cannot be read.
        ConfigError: ``quality`` has a line that is not a request.
    """
    report = examine(folder, checkpoint, lora=lora, lora_alpha=lora_alpha, quality=quality, progress=progress)
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
    quality: str | Path | None = None,
    progress: Progress | None = None,
) -> VerificationReport:
    """Like `verify`, but a comparison that does not hold is only reported."""
    started = time.perf_counter()
    tell = progress or (lambda stage, fraction: None)
    tell("checking files", 0.0)
    subject = _Subject(open_folder(folder, verify_hashes=True))
    transcripts = [] if quality is None else subject.transcripts(quality)
    source = HashedSource(open_source(checkpoint, lora, lora_alpha))
    truth: TensorSource = source
    weights = []
    if subject.quantization is not None and _same_shapes(subject.model, source):
        truth = DequantizedSource(source, subject.model, subject.quantization)
        weights.append(check_weights(truth, tell))  # hashes the checkpoint on the way
    checks = [
        Check("files", True, f"all files have the sizes and hashes in {MANIFEST}"),
        _check_source(subject.model, source),
    ]
    if not subject.requests:
        detail = "the model's bias table is too small for the segments of any request"
        checks.append(Check("requests", False, detail))
    if not all(check.passed for check in checks):
        return VerificationReport(tuple(checks), ("nothing else was compared",), time.perf_counter() - started)
    checks += weights
    reason = subject.why_no_bodies
    if reason and find_spec("torch") is None:
        nothing = f"nothing else was compared: torch is not installed, and {reason}"
        return VerificationReport(tuple(checks), (nothing,), time.perf_counter() - started)
    tell("running the reference", 0.1)
    expected, notes = _expect(subject, truth, tell)
    kinds = [FUNCTIONS] if expected.by != FUNCTIONS else []
    if reason:
        kinds = []
        notes.append(f"function bodies not compared: {reason}")
    if native.library_path() is None:
        notes.append("native kernels not compared: the op library is not built, or CPMBEE_NATIVE=0 switches it off")
    else:
        kinds.insert(0, NATIVE)
    if subject.tolerance > TOLERANCE and expected.by == REFERENCE:
        tell("running exact products", 0.1)
        checks += _compare_exact(subject, expected)
    for n, kind in enumerate(kinds):
        tell(f"running the {kind}", (n + 1) / (len(kinds) + 1))
        checks += _compare(subject, expected, kind)
    measured = None
    if transcripts and expected.by == REFERENCE and kinds:
        tell("measuring quality", 0.0)
        measured = _measure(subject, source, transcripts, tell)
    elif transcripts:
        why = "nothing here runs the model" if expected.by == REFERENCE else "torch is not installed"
        notes.append(f"quality not measured: {why}")
    tell("verified", 1.0)
    return VerificationReport(tuple(checks), tuple(notes), time.perf_counter() - started, measured)


class _Subject:
    """The folder under examination, and what it is asked.

    Attributes:
        model: the folder.
        quantization: how its matrices are quantized, or None where they are not.
        requests: those that the model can encode.
        frugal: memory is short, so that nothing may hold all weights at once.
    """

    def __init__(self, model: ModelFolder) -> None:
        self.model = model
        self.quantization = stored_quantization(model)
        self.frugal = False
        self._tokenizer = Tokenizer.from_file(model.vocabulary)
        self._all = make_requests(self._tokenizer)
        encodable = {probe.name for probe in self.probes()}
        self.requests = [request for request in self._all if request.name in encodable]

    def probes(self) -> list[Probe]:
        """Fresh probes; recording writes tokens into them."""
        requests = self.requests[:FEW_REQUESTS] if self.frugal else self._all
        return make_probes(requests, self._tokenizer, self.model.config, STEPS)

    @property
    def why_no_bodies(self) -> str | None:
        """Why the function bodies cannot run here, if so."""
        return native.why_no_bodies(self.model.precision.values(), import_onnxruntime().__version__)

    @property
    def tolerance(self) -> float:
        """Of logits, relative to their range."""
        products = TOLERANCE if self.quantization is None else ROUNDED_TOLERANCE
        cache = self.model.cache if self.model.config.attention_layers else "fp32"
        return max(products, CACHE_TOLERANCES[cache])

    def transcripts(self, path: str | Path) -> list[Transcript]:
        """Requests of the caller's, with their answers."""
        return read_transcripts(path, self._tokenizer, self.model.config)

    def onnx_model(self, kind: str, cache_rows: int = CACHE_ROWS) -> OnnxModel:
        """A session on the folder for comparing logits."""
        return OnnxModel(self.model.model, cache_rows, use_native=kind == NATIVE)

    def logits_model(self, kind: str) -> LogitsModel:
        """The folder's model for calls that are known beforehand, piece by piece where memory is short."""
        if not self.frugal:
            return self.onnx_model(kind)
        model = onnx.load(self.model.model, load_external_data=False)
        return PiecewiseModel(model, external_tensors(self.model.model), use_native=kind == NATIVE)

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


def _expect(subject: _Subject, source: TensorSource, tell: Progress) -> tuple[_Expected, list[str]]:
    """The best reference that this machine can run, and notes on what it leaves out."""
    needed, available = COPIES * fp32_bytes(subject.model.config), available_memory()
    notes = []
    if needed > available:
        subject.frugal = True
        notes.append(
            "everything ran one layer at a time: answers were not compared, for that needs "
            f"{needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available"
        )
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        notes.insert(0, "PyTorch reference not run: torch is not installed")
        plans = plan(subject.probes(), STEPS)
        answers = subject.logits_model(FUNCTIONS).run_all([planned.inputs for planned in plans])
        return _Expected(FUNCTIONS, [Call(p.kind, p.inputs, a) for p, a in zip(plans, answers, strict=True)]), notes
    from cpmbee.export.reference_loading import ReferenceModel, few_threads, load_reference, record_streamed

    precision: Precision = "fp16" if subject.model.precision.get("embedding") == "fp16" else "fp32"
    with few_threads(subject.model.config):
        if subject.frugal:
            return _Expected(REFERENCE, record_streamed(source, precision, subject.probes(), STEPS, tell)), notes
        model = load_reference(source, precision)
        calls = record(ReferenceModel(model, CACHE_ROWS), subject.probes(), STEPS)
        written = write_answers(subject.reference_engine(model), subject.requests)
    return _Expected(REFERENCE, calls, (written, model)), notes


def _compare(subject: _Subject, expected: _Expected, kind: str) -> list[Check]:
    """Logits and, where they are known, answers."""
    checks = replay(subject.logits_model(kind), expected.calls, kind, expected.by, subject.tolerance)
    if expected.answers is not None:
        answers, model = expected.answers
        error = min(subject.tolerance, max(check.error or 0.0 for check in checks))
        noisy = subject.reference_engine(model, noise=2 * error)
        checks += compare_answers(subject.engine(kind), subject.requests, answers, noisy, kind)
    return checks


def _compare_exact(subject: _Subject, expected: _Expected) -> list[Check]:
    """Logits of the graph without rounding of activations and cache rows.

    For a large model one call of each kind has to do: a prompt, a cached step behind it, the batch.
    """
    calls = expected.calls
    who = "exact cache" if subject.quantization is None else "exact products"
    if fp32_bytes(subject.model.config) > LARGE_MODEL_BYTES:
        calls = [*calls[:2], calls[-1]]
    return replay(ExactModel(subject.model.model), calls, who, expected.by)


def _measure(subject: _Subject, source: TensorSource, transcripts: list[Transcript], tell: Progress) -> Quality:
    """The folder's probabilities against those of the fp32 reference."""
    from cpmbee.export.reference_loading import few_threads, streamed_logits

    kind = FUNCTIONS if native.library_path() is None else NATIVE
    model = subject.onnx_model(kind, cache_rows=max(transcript.num_tokens for transcript in transcripts))
    with few_threads(source.config):
        expected = streamed_logits(source, [transcript.inputs for transcript in transcripts], tell)
        return measure(model, transcripts, expected)


def _same_shapes(model: ModelFolder, source: TensorSource) -> bool:
    """Whether the checkpoint can be the one that was exported."""
    return expected_tensors(model.config) == expected_tensors(source.config)


def _check_source(model: ModelFolder, source: HashedSource) -> Check:
    """Whether the checkpoint is the one that was exported."""
    same = model.source_sha256 == source.hexdigest()
    found = "the one" if same else "not the one"
    return Check("source", same, f"the checkpoint, with its LoRA delta if any, is {found} that was exported")
