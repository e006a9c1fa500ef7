"""Verification finds what is wrong, passes what is right, and says what it did not look at."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cpmbee import native
from cpmbee.errors import ExportError, ModelFolderError
from cpmbee.export import comparison, export, verification, verify, weights
from cpmbee.export.answers import record_answers
from cpmbee.export.comparison import BATCH, PROMPT, STEP, TOLERANCE, Call, allow_noise, compare, replay
from cpmbee.export.probes import GraphInputs, make_requests
from cpmbee.export.reference import ReferenceBackend
from cpmbee.export.reference_loading import ReferenceModel, load_reference, record_streamed
from cpmbee.export.sources import open_source
from cpmbee.export.verification import examine
from cpmbee.export.weights import Precision
from cpmbee.tokenizer import Tokenizer
from tests.export.cases import CACHE_ROWS, CONFIGS, make_checkpoint, make_folder, probes_for
from tests.golden import DATA, GOLDEN, requires_golden
from tests.model.factory import random_model, tiny_config, write_checkpoint

KINDS = {"prompt logits", "cached step logits", "padded batch logits", "greedy answers", "beam answers"}
needs_native = pytest.mark.skipif(native.library_path() is None, reason="the op library is not built")


def rehash(folder: Path, name: str) -> None:
    """Make the manifest agree with an altered file."""
    manifest = json.loads((folder / "engine.json").read_text())
    manifest["files"][name]["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "engine.json").write_text(json.dumps(manifest))


@needs_native
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["full", "pruned", "no attention", "nothing left", "half"])
def test_right_exports_pass(name: str, precision: Precision, tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path, CONFIGS[name], precision, cache="fp32")
    report = verify(out, checkpoint)
    both = {f"{kind}, {who}" for kind in KINDS for who in ("native kernels", "function bodies")}
    assert {check.name for check in report.checks} == {"files", "source", *both}
    assert report.passed
    assert report.notes == ()


@requires_golden
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_recorded_checkpoint_passes(precision: Precision, tmp_path: Path) -> None:
    report = export(GOLDEN / "tiny-pruned", tmp_path / "out", precision, vocab=DATA / "bee_vocab.txt")
    assert report.verification is not None
    assert report.verification.passed
    written = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert written["verification"]["passed"]
    assert len(written["verification"]["checks"]) == len(report.verification.checks)


@pytest.mark.parametrize(
    ("fold", "value"), [("RESIDUAL_SCALE", 1.06), ("PHASE_BASE", 9000.0)], ids=["residual", "phases"]
)
def test_wrong_fold_fails_the_export(fold: str, value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    monkeypatch.setattr(weights, fold, value)
    with pytest.raises(ExportError, match="verification does not hold: prompt logits"):
        export(checkpoint, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]


def test_failed_export_keeps_the_model_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, out = make_folder(tmp_path)
    before = (out / "model.onnx.data").read_bytes()
    monkeypatch.setattr(weights, "RESIDUAL_SCALE", 1.06)
    with pytest.raises(ExportError):
        export(checkpoint, out, overwrite=True)
    assert (out / "model.onnx.data").read_bytes() == before


def test_altered_file_is_found(tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path)
    data = bytearray((out / "model.onnx.data").read_bytes())
    data[5000] ^= 1
    (out / "model.onnx.data").write_bytes(data)
    with pytest.raises(ModelFolderError, match=r"model\.onnx\.data"):
        verify(out, checkpoint)


def test_altered_weights_are_found_even_with_the_right_hash(tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path)
    data = np.fromfile(out / "model.onnx.data", np.float32)
    data *= np.float32(1.01)
    data.tofile(out / "model.onnx.data")
    rehash(out, "model.onnx.data")
    report = examine(out, checkpoint)
    failed = {check.name for check in report.checks if not check.passed}
    assert {"prompt logits, function bodies", "cached step logits, function bodies"} <= failed
    with pytest.raises(ExportError, match="does not hold"):
        verify(out, checkpoint)


def test_another_checkpoint_is_found(tmp_path: Path) -> None:
    _, out = make_folder(tmp_path)
    other = write_checkpoint(tmp_path / "other", random_model(seed=1))
    with pytest.raises(ExportError, match="not the one that was exported"):
        verify(out, other)


@requires_golden
def test_forgotten_lora_delta_is_found(exported_golden: Callable[..., Path]) -> None:
    out = exported_golden("tiny", "lora-delta.pt")
    with pytest.raises(ExportError, match="LoRA"):
        verify(out, GOLDEN / "tiny")
    assert verify(out, GOLDEN / "tiny", lora=GOLDEN / "tiny" / "lora-delta.pt", lora_alpha=16).passed


def test_rounding_to_fp16_is_not_an_error(tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path, precision="fp16", cache="fp32")  # the checkpoint is fp32
    worst = max(check.error or 0.0 for check in verify(out, checkpoint).checks)
    assert worst < 1e-5


def test_without_native_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CPMBEE_NATIVE", "0")
    checkpoint, out = make_folder(tmp_path)
    report = verify(out, checkpoint)
    assert [note for note in report.notes if "native kernels not compared" in note]
    assert {check.name for check in report.checks} == {"files", "source", *(f"{k}, function bodies" for k in KINDS)}


@needs_native
def test_without_torch(tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path)
    code = f"""
import sys
sys.modules["torch"] = None
from cpmbee.export import verify
report = verify({str(out)!r}, {str(checkpoint)!r})
print(*report.notes, *(check.name for check in report.checks), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "PyTorch reference not run: torch is not installed",
        "files",
        "source",
        "prompt logits, native kernels",
        "cached step logits, native kernels",
        "padded batch logits, native kernels",
    ]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["pruned", "half", "nothing left"])
def test_layer_by_layer_reference_is_the_reference(name: str, precision: Precision, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", CONFIGS[name])
    source = open_source(checkpoint)
    streamed = record_streamed(source, precision, probes_for(checkpoint), steps=2)
    assert {call.kind for call in streamed} == {PROMPT, STEP, BATCH}
    model = ReferenceModel(load_reference(source, precision), CACHE_ROWS)
    for call in streamed:
        np.testing.assert_allclose(call.logits, model.run(call.inputs), rtol=1e-5, atol=1e-5)


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "available_memory", lambda: 1000)
    checkpoint, out = make_folder(tmp_path)
    report = verify(out, checkpoint)
    logits = {"prompt logits", "cached step logits", "padded batch logits"}
    assert {check.name.partition(",")[0] for check in report.checks} == {"files", "source", *logits}
    assert "one layer at a time" in report.notes[0]


def test_requests_that_the_model_cannot_encode_are_left_out(tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path, tiny_config(position_bias_num_segment_buckets=24))  # flat dicts only
    names = [request.name for request in make_requests(Tokenizer.from_file(out / "vocab.txt"))]
    assert 0 < len(probes_for(out)) < len(names)
    assert verify(out, checkpoint).passed


def test_model_that_can_encode_nothing(tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path, tiny_config(position_bias_num_segment_buckets=10))
    with pytest.raises(ExportError, match="bias table is too small"):
        verify(out, checkpoint)


def test_verification_leaves_the_threads_of_torch_alone(tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        verify(out, checkpoint)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Fixed:
    """A model that always answers the same."""

    def __init__(self, *logits: float) -> None:
        self.logits = np.array(logits, np.float32).reshape(1, 1, -1)

    def run_all(self, inputs: Sequence[GraphInputs]) -> Iterator[np.ndarray]:
        return iter([self.logits])


NO_INPUTS = GraphInputs(*[np.zeros((1, 1), np.int32)] * 8)  # type: ignore[arg-type]


def agree(reference: Fixed, other: Fixed) -> bool:
    (check,) = replay(other, [Call("prompt", NO_INPUTS, reference.logits)], "other", "reference")
    return check.passed


def test_tolerance() -> None:
    assert agree(Fixed(0, 1, 10), Fixed(0, 1, 10 + 5 * TOLERANCE))
    assert not agree(Fixed(0, 1, 10), Fixed(0, 1, 10 + 20 * TOLERANCE))
    assert not agree(Fixed(0, 1, 10), Fixed(0, 1, float("nan")))
    assert not agree(Fixed(0, 1, 10), Fixed(0, 1, float("inf")))


def test_a_model_that_magnifies_rounding_is_not_refused_for_it() -> None:
    (check,) = compare(
        [np.float32([[[0, 1, 10.005]]])], [Call("logits", NO_INPUTS, np.float32([[[0, 1, 10]]]))], "it", ""
    )
    assert not check.passed
    assert [again.passed for again in allow_noise([check], 1e-4)] == [True]
    assert [again.passed for again in allow_noise([check], 1e-6)] == [False]
    far = replace(check, error=0.02)
    assert [again.passed for again in allow_noise([far], 1.0)] == [False]


def test_sharp_attention_magnifies_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(tiny_config(num_hidden_layers=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "project_q" in name:
                parameter.mul_(3e4)
    checkpoint = write_checkpoint(tmp_path / "sharp", model, file_format="safetensors")
    assert export(checkpoint, tmp_path / "out").verification is not None
    monkeypatch.setattr(comparison, "NOISE_TOLERANCE", 0.0)
    with pytest.raises(ExportError, match="fp32 itself moves them"):
        verify(tmp_path / "out", checkpoint)


def test_a_tie_is_no_error(tmp_path: Path) -> None:
    assert agree(Fixed(-10, 1, 1 - 1e-4), Fixed(-10, 1 - 1e-4, 1))


def test_every_call_of_an_engine_that_writes_answers_is_compared(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    tokenizer = Tokenizer.from_file(checkpoint / "vocab.txt")
    requests = make_requests(tokenizer)
    backend = ReferenceBackend(random_model(), CACHE_ROWS)
    calls = record_answers(backend, tokenizer, requests)
    assert {call.kind for call in calls} == {"greedy answers", "beam answers"}
    assert max(len(call.inputs.slots) for call in calls) == 3 * 5  # the beams of all requests without examples
    for seed, passed in ((0, True), (1, False)):
        model = ReferenceModel(random_model(seed=seed), CACHE_ROWS)
        checks = compare([model.run(call.inputs) for call in calls], calls, "it", "reference")
        assert [check.passed for check in checks] == [passed, passed]
    with backend.runner() as runner:  # as it was before
        assert "run" not in vars(runner)


def test_folder_that_was_moved(tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path)
    shutil.move(out, tmp_path / "elsewhere")
    assert verify(tmp_path / "elsewhere", checkpoint).passed
