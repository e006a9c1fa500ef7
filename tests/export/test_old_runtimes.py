"""Models with 8-bit weights on an ONNX Runtime whose function bodies cannot run them, made up where it is newer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from cpmbee import Engine, native
from cpmbee.errors import ModelFolderError
from cpmbee.export import export
from cpmbee.export.verification import FUNCTIONS, examine
from cpmbee.export.weights import Precision
from cpmbee.native import why_no_bodies
from tests.export.cases import make_checkpoint

needs_native = pytest.mark.skipif(native.library_path() is None, reason="the op library is not built")
BECAUSE = "ONNX Runtime 1.21.1 does not know the 8-bit product"


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.21.1")


def quantized(folder: Path, precision: Precision, head_bits: int = 8) -> tuple[Path, Path]:
    checkpoint, out = make_checkpoint(folder / "checkpoint"), folder / "out"
    export(checkpoint, out, precision, head_bits=head_bits, verify=False)
    return checkpoint, out


@pytest.mark.parametrize(
    ("precisions", "version", "runs"),
    [
        (["int8", "int4"], "1.18.1", False),
        (["int8"], "1.21.0", False),
        (["int8"], "1.22.0", True),
        (["int8"], "2.0.0", True),
        (["int4"], "1.18.1", True),
        (["fp32", "fp16"], "1.18.1", True),
    ],
)
def test_who_runs_function_bodies(precisions: list[str], version: str, runs: bool) -> None:
    assert (why_no_bodies(precisions, version) is None) is runs


@needs_native
@pytest.mark.usefixtures("old")
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_native_kernels_are_verified_alone(tmp_path: Path, precision: Precision) -> None:
    checkpoint, out = quantized(tmp_path, precision)
    report = examine(out, checkpoint)
    assert report.passed
    compared = {check.name for check in report.checks}
    assert "prompt logits, native kernels" in compared
    assert not any(FUNCTIONS in name for name in compared)
    assert report.notes[-1].startswith(f"function bodies not compared: {BECAUSE}")


@needs_native
@pytest.mark.usefixtures("old")
def test_4_bits_are_verified_with_both(tmp_path: Path) -> None:
    checkpoint, out = quantized(tmp_path, "int4", head_bits=4)
    report = examine(out, checkpoint)
    assert report.passed
    assert any(FUNCTIONS in check.name for check in report.checks)
    assert report.notes == ()


@pytest.mark.usefixtures("old")
def test_nothing_to_compare_with_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, out = quantized(tmp_path, "int8")
    found = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        return None if name == "torch" else found(name, *rest)

    monkeypatch.setattr("cpmbee.export.verification.find_spec", find_spec)
    report = examine(out, checkpoint)
    assert report.passed
    (note,) = report.notes
    assert note.startswith(f"nothing else was compared: torch is not installed, and {BECAUSE}")


@pytest.mark.usefixtures("old")
def test_quality_is_not_measured_where_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, out = quantized(tmp_path, "int8")
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"input": "a", "<ans>": "b"}\n', encoding="utf-8")
    monkeypatch.setenv("CPMBEE_NATIVE", "0")
    report = examine(out, checkpoint, quality=requests)
    assert report.passed
    assert report.quality is None
    assert report.notes[-1] == "quality not measured: nothing here runs the model"


@pytest.mark.usefixtures("old")
def test_an_engine_without_native_kernels_says_what_is_missing(tmp_path: Path) -> None:
    _, out = quantized(tmp_path, "int8")
    with pytest.raises(ModelFolderError, match=rf"{BECAUSE}.*1\.22 or newer, or the native kernels$"):
        Engine.from_pretrained(out, native=False)
