"""Does a model folder compute what its checkpoint means? Compared with the PyTorch reference, in the engine's own way.

Logits are compared call by call (a prompt, cached steps after it, a padded batch, all calls of the engine while it
writes answers): with the native kernels, and with the function bodies of the file. Without torch the reference cannot
run: both are then compared with exact products, or where nothing is rounded with each other, and the report says so.

A quantized folder is compared with the reference on the weights that the file means: closely with exact products and an
exact cache (`cpmbee.export.exact_model`), and where activations or cache rows are rounded, by whether the errors are
those of rounding (`cpmbee.export.divergence`). How much quantization costs is another question, and no check: the
report's quality answers it, against fp32 and on requests of the caller's.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from cpmbee import native
from cpmbee.errors import ExportError
from cpmbee.export.answers import record_answers
from cpmbee.export.comparison import Call, LogitsModel, allow_noise, compare, fp32_noise, plan, record, replay
from cpmbee.export.dequantized import DequantizedSource, check_weights, external_tensors, stored_quantization
from cpmbee.export.divergence import Rounding
from cpmbee.export.exact_model import ExactModel
from cpmbee.export.memory import available_memory, fp32_bytes
from cpmbee.export.onnx_model import OnnxModel
from cpmbee.export.pieces import PiecewiseModel
from cpmbee.export.probes import GraphInputs, Probe, make_probes, make_requests
from cpmbee.export.quality import measure
from cpmbee.export.report import Check, Quality, VerificationReport
from cpmbee.export.rounded_model import RoundedModel
from cpmbee.export.sources import HashedSource, TensorSource, open_source
from cpmbee.export.transcripts import Transcript, read_transcripts
from cpmbee.export.weights import Precision
from cpmbee.folder import MANIFEST, ModelFolder, open_folder
from cpmbee.model.tensor_names import expected_tensors
from cpmbee.onnxruntime_import import import_onnxruntime
from cpmbee.session import OrtBackend
from cpmbee.tokenizer import Tokenizer

if TYPE_CHECKING:
    from cpmbee.model import CpmBee
    from cpmbee.model.lora import LoraDelta

Float32 = NDArray[np.float32]
Progress = Callable[[str, float], None]
_Planned = TypeVar("_Planned")

FEW_REQUESTS = 3  # that a model gets which runs one layer at a time
STEPS = 4  # cached tokens after each prompt
CACHE_ROWS = 2048
LARGE_MODEL_BYTES = 256 << 20  # of fp32 weights, from which on an exact product takes its time
COPIES = 4  # of the weights in fp32, the most that comparing everything holds: reference, widened file, packed file
REFERENCE, NATIVE, FUNCTIONS = "PyTorch reference", "native kernels", "function bodies"
EXACT, EXACT_CACHE = "exact products", "exact cache"
ADVICE = {  # what to do where a check does not hold, by the end of its name
    "source": "give the checkpoint that was exported, and with --lora the delta that was merged",
    "weights": "the file does not hold this checkpoint's weights: export again",
    EXACT: "the graph is not this checkpoint's: export again with this version, and report it if that does not help",
    NATIVE: "rebuild the package for this machine, or run without native kernels (CPMBEE_NATIVE=0), and report it",
    FUNCTIONS: "the file is right only with native kernels: try another version of ONNX Runtime, and report it",
}


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
            advice = ADVICE.get(check.name.rpartition(", ")[2])
            said = f"{folder}: verification does not hold: {check.name}: {check.detail}"
            raise ExportError(f"{said}; {advice}" if advice else said)


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
    rounded: list[Float32] = []
    if subject.rounds:
        if expected.by == REFERENCE:
            tell("running exact products", 0.1)
            who = EXACT_CACHE if subject.quantization is None else EXACT
            checks += _fair(expected, replay(ExactModel(subject.model.model), expected.calls, who, REFERENCE))
        tell("running rounded products", 0.3)
        rounded = subject.rounded(expected.calls)
    for n, kind in enumerate(kinds):
        tell(f"running the {kind}", (n + 1) / (len(kinds) + 1))
        if n and subject.large:
            expected.model = None  # whole answers take a large model minutes: once is enough
        checks += _compare(subject, expected, rounded, kind)
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
    def _threads(self) -> int:
        """Of a session: one for a small model, whose threads lose more in waiting than they gain."""
        return 0 if self.large else 1

    @property
    def large(self) -> bool:
        """Whether a product in fp32 takes its time."""
        return fp32_bytes(self.model.config) > LARGE_MODEL_BYTES

    @property
    def rounds(self) -> bool:
        """Whether it rounds activations or cache rows, which the reference does not."""
        return self.quantization is not None or (
            bool(self.model.config.attention_layers) and self.model.cache != "fp32"
        )

    def transcripts(self, path: str | Path) -> list[Transcript]:
        """Requests of the caller's, with their answers."""
        return read_transcripts(path, self._tokenizer, self.model.config)

    def onnx_model(self, kind: str, cache_rows: int = CACHE_ROWS) -> OnnxModel:
        """A session on the folder for comparing logits."""
        return OnnxModel(self.model.model, cache_rows, use_native=kind == NATIVE, num_threads=self._threads)

    def logits_model(self, kind: str) -> LogitsModel:
        """The folder's model for calls that are known beforehand, piece by piece where memory is short."""
        if not self.frugal:
            return self.onnx_model(kind)
        model = onnx.load(self.model.model, load_external_data=False)
        return PiecewiseModel(model, external_tensors(self.model.model), use_native=kind == NATIVE)

    def rounded(self, calls: list[Call]) -> list[Float32]:
        """What rounding alone makes of the logits of some calls."""
        return list(RoundedModel(self.model.model, self.model.cache).run_all([call.inputs for call in calls]))

    def answers(self, kind: str) -> list[Call]:
        """The calls of an engine that writes answers."""
        backend = OrtBackend(self.model, "cpu", self._threads, CACHE_ROWS, native=kind == NATIVE)
        return record_answers(backend, self._tokenizer, self.requests)

    def few(self, calls: list[_Planned]) -> list[_Planned]:
        """The calls that products in fp32 have to repeat.

        For a large model one of each kind has to do: a prompt, a cached step behind it, the batch.
        """
        return [*calls[:2], calls[-1]] if self.rounds and self.large else calls


@dataclass
class _Expected:
    """What the folder is compared with.

    Attributes:
        by: who computed it.
        calls: calls of the graph with their logits.
        model: the reference, to be asked more; None where only these calls can be compared.
        answered: the calls of an engine that it answered last.
        rounded: what rounding makes of their logits.
    """

    by: str
    calls: list[Call]
    model: CpmBee | None = None
    answered: list[Call] = field(default_factory=list)
    rounded: list[Float32] = field(default_factory=list)


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
        plans = subject.few(plan(subject.probes(), STEPS))
        by = EXACT if subject.rounds else FUNCTIONS
        model = ExactModel(subject.model.model) if subject.rounds else subject.logits_model(FUNCTIONS)
        answers = model.run_all([planned.inputs for planned in plans])
        return _Expected(by, [Call(p.kind, p.inputs, a) for p, a in zip(plans, answers, strict=True)]), notes
    from cpmbee.export.reference_loading import ReferenceModel, few_threads, load_reference, record_streamed

    precision: Precision = "fp16" if subject.model.precision.get("embedding") == "fp16" else "fp32"
    with few_threads(subject.model.config):
        if subject.frugal:
            calls = record_streamed(source, precision, subject.probes(), STEPS, tell)
            return _Expected(REFERENCE, subject.few(calls)), notes
        reference = load_reference(source, precision)
        calls = record(ReferenceModel(reference, CACHE_ROWS), subject.probes(), STEPS)
    return _Expected(REFERENCE, subject.few(calls), reference), notes


def _compare(subject: _Subject, expected: _Expected, rounded: list[Float32], kind: str) -> list[Check]:
    """Logits of the calls that are known beforehand and, with the reference at hand, of those that answers make."""
    calls = expected.calls
    ours: Iterable[Float32] = subject.logits_model(kind).run_all([call.inputs for call in calls])
    if expected.model is not None:
        made = subject.answers(kind)
        _answer(subject, expected, made)
        ours = chain(ours, [call.logits for call in made])
        calls, rounded = calls + expected.answered, rounded + expected.rounded
    if subject.rounds:
        return Rounding(calls, rounded).compare(ours, kind, expected.by)
    return _fair(expected, compare(ours, calls, kind, expected.by))


def _fair(expected: _Expected, checks: list[Check]) -> list[Check]:
    """The same checks; those that do not hold are judged by how much of the difference is fp32's, if that can be known.

    A model with very sharp attention magnifies rounding errors of any kind, and an fp32 reference is then not exact.
    """
    if expected.model is None or all(check.passed for check in checks):
        return checks
    from cpmbee.export.reference_loading import ReferenceModel, few_threads

    with few_threads(expected.model.config):
        wide = ReferenceModel(copy.deepcopy(expected.model).double(), CACHE_ROWS)
        noise = fp32_noise((wide.run(call.inputs) for call in expected.calls), expected.calls)
    return allow_noise(checks, noise)


def _answer(subject: _Subject, expected: _Expected, made: list[Call]) -> None:
    """Let the reference answer the calls of an engine, unless they are those that it answered last."""
    from cpmbee.export.reference_loading import ReferenceModel, few_threads

    if expected.model is None or _same_calls(made, expected.answered):
        return
    with few_threads(subject.model.config):
        reference = ReferenceModel(expected.model, CACHE_ROWS)
        expected.answered = [replace(call, logits=reference.run(call.inputs)) for call in made]
    if subject.rounds:
        expected.rounded = subject.rounded(made)


def _same_calls(some: list[Call], others: list[Call]) -> bool:
    def equal(a: GraphInputs, b: GraphInputs) -> bool:
        return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in GraphInputs._fields)

    return len(some) == len(others) and all(equal(x.inputs, y.inputs) for x, y in zip(some, others, strict=True))


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
