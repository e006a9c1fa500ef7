"""Calibrated exports: moments of inputs, corrected rounding, and what it gains."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cpmbee.errors import ConfigError, ExportError
from cpmbee.export import export, quantize
from cpmbee.export.calibration import DAMPING, Calibration
from cpmbee.export.error_feedback import Moments, quantize_corrected
from cpmbee.export.packing import BLOCK_SIZES, BlockFormat, dequantize
from cpmbee.export.quantize import Quantization
from cpmbee.export.reference_loading import load_reference
from cpmbee.export.sources import open_source
from cpmbee.export.transcripts import read_transcripts
from cpmbee.model.layers import Linear
from cpmbee.tokenizer import Tokenizer
from tests.export.cases import make_checkpoint
from tests.model.factory import VOCABULARY, tiny_config

TOKENIZER = Tokenizer(VOCABULARY)
Array = npt.NDArray[Any]


def moments_of(inputs: Array) -> Moments:
    means = inputs.T @ inputs / len(inputs)
    inverse = np.linalg.inv(means + 1e-3 * np.eye(len(means)))
    return Moments(means.diagonal().astype(np.float32), np.linalg.cholesky(inverse).T.astype(np.float32))


def correlated(rng: np.random.Generator, count: int, dim: int) -> Array:
    """Inputs that mostly lie in a quarter of their space."""
    return rng.standard_normal((count, dim // 4)) @ rng.standard_normal((dim // 4, dim)) + 0.1 * rng.standard_normal(
        (count, dim)
    )


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("bits", [4, 8])
def test_outputs_lose_less_when_errors_are_corrected(bits: int, block_size: int) -> None:
    rng = np.random.default_rng(0)
    dim = 200  # not a multiple of any block
    inputs = correlated(rng, 1000, dim)
    layout = BlockFormat(bits, block_size)
    rows = np.zeros(layout.padded(48, dim), np.float32)
    rows[:, :dim] = rng.standard_normal((48, dim))
    matrix = Quantization(bits, 8, block_size).matrix("w", ("w",), dim, (48,), 1.0, bits)
    ones = np.ones(rows.shape[1], np.float32)
    plain, corrected = (
        matrix.rounded(rows, ones),
        quantize_corrected(rows, moments_of(inputs), layout, matrix.block_scales),
    )
    lost = []
    for made in (plain, corrected):
        values = dequantize(made.packed, made.scales, 48, dim, layout)
        lost.append(float(np.square(inputs @ (values - rows[:, :dim]).T).sum()) / len(inputs))
    assert lost[1] < 0.4 * lost[0]
    assert corrected.error == pytest.approx(lost[1], rel=0.05)  # but for the damping
    assert not dequantize(corrected.packed, corrected.scales, 48, rows.shape[1], layout)[:, dim:].any()


def test_nothing_is_corrected_where_inputs_are_uncorrelated() -> None:
    rows = np.random.default_rng(0).standard_normal((16, 128)).astype(np.float32)
    layout = BlockFormat(4, 64)
    matrix = Quantization(4, 8, 64).matrix("w", ("w",), 128, (16,), 1.0, 4)
    moments = Moments(np.ones(128, np.float32), np.eye(128, dtype=np.float32))
    plain, corrected = (
        matrix.rounded(rows, moments.squares),
        quantize_corrected(rows, moments, layout, matrix.block_scales),
    )
    np.testing.assert_array_equal(corrected.packed, plain.packed)
    np.testing.assert_array_equal(corrected.scales, plain.scales)
    assert corrected.error == pytest.approx(plain.error, rel=1e-5)
    assert corrected.power == pytest.approx(plain.power, rel=1e-5)


def test_moments_are_of_the_inputs_of_each_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpmbee.export.calibration.ROWS", 20)  # several rounds
    config = tiny_config(mask_modules=((False, False), (True, True), (True, False), (False, True)), num_hidden_layers=4)
    source = open_source(make_checkpoint(tmp_path / "checkpoint", config))
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps({"input": text, "<ans>": "b"}) + "\n" for text in ("今天", "abc", "天气")))
    seen: dict[str, list[torch.Tensor]] = {}
    model = load_reference(source, "fp32")
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            hook = lambda _, inputs, name=name: seen.setdefault(f"{name}.weight", []).append(inputs[0][0])  # noqa: E731
            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        for transcript in read_transcripts(file, TOKENIZER, config):
            arrays = (transcript.inputs.input_ids, transcript.inputs.input_subs, transcript.inputs.relation)
            model(*map(torch.from_numpy, arrays))
    calibration = Calibration(source, TOKENIZER, file)
    asked = [name for name in seen if not name.endswith(("project_k.weight", "project_v.weight", "w_1.weight"))]
    assert len(asked) == 2 * 2 + 2 * 2
    for name in asked:
        inputs = torch.cat(seen[name]).double().numpy()
        means = inputs.T @ inputs / len(inputs)
        moments = calibration.moments(name)
        np.testing.assert_allclose(moments.squares, means.diagonal(), rtol=1e-4, atol=1e-6)
        raised = means + DAMPING * means.diagonal().mean() * np.eye(len(means))
        factor = moments.factor.astype(np.float64)
        assert not np.tril(factor, -1).any()
        np.testing.assert_allclose(raised @ factor.T @ factor, np.eye(len(means)), atol=2e-3)


def test_requests_without_effect_do_no_harm(tmp_path: Path) -> None:
    """Silent inputs have no moments to speak of; the export still holds."""
    moments = Moments(np.zeros(64, np.float32), np.eye(64, dtype=np.float32) * np.float32(1e19))
    rows = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    matrix = Quantization(4, 8, 32).matrix("w", ("w",), 64, (16,), 1.0, 4)
    made = quantize_corrected(rows, moments, BlockFormat(4, 32), matrix.block_scales)
    values = dequantize(made.packed, made.scales, 16, 64, BlockFormat(4, 32))
    assert np.square(values - rows).mean() < 0.02


def test_report_and_manifest(tmp_path: Path) -> None:
    checkpoint, file = make_checkpoint(tmp_path / "checkpoint"), tmp_path / "requests.jsonl"
    file.write_text('{"input": "今天天气", "<ans>": "真好"}\n')
    plain = export(checkpoint, tmp_path / "plain", "int4", verify=False)
    calibrated = export(checkpoint, tmp_path / "calibrated", "int4", calibration=file)
    assert calibrated.verification is not None
    assert calibrated.verification.passed
    assert json.loads((tmp_path / "calibrated" / "engine.json").read_text())["quantization"]["calibrated"]
    assert [matrix.name for matrix in calibrated.matrices] == [matrix.name for matrix in plain.matrices]
    assert calibrated.matrices[0] == plain.matrices[0]  # the embedding
    for ours, theirs in zip(calibrated.matrices[1:], plain.matrices[1:], strict=True):
        assert 0 < ours.error < theirs.error


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"precision": "int4", "method": "nearest"}])
def test_what_cannot_be_calibrated(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="calibration is for int8 and int4 with method search"):
        export(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "out", calibration=tmp_path / "none", **options)


def test_panels_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, file = make_checkpoint(tmp_path / "checkpoint"), tmp_path / "requests.jsonl"
    file.write_text('{"input": "今天天气", "<ans>": "真好"}\n')
    written = []
    for panel_bytes in (1, quantize.CORRECTED_PANEL_BYTES):
        monkeypatch.setattr(quantize, "CORRECTED_PANEL_BYTES", panel_bytes)
        export(checkpoint, tmp_path / "out", "int8", calibration=file, verify=False, overwrite=True)
        written.append(np.fromfile(tmp_path / "out" / "model.onnx.data", np.uint8))
    assert (written[0] != written[1]).mean() < 1e-3  # products of other shapes round differently


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_refused(tmp_path: Path, bad: float) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text(json.dumps({"input": "a", "<ans>": "b"}) + "\n", encoding="utf-8")
    source = open_source(make_checkpoint(tmp_path / "checkpoint"))
    calibration = Calibration(source, TOKENIZER, requests)
    name = "encoder.layers.0.self_att.self_attention.project_q.weight"
    calibration.moments(name)
    products = next(iter(calibration._gathered.values()))
    products._sums.fill_(bad)
    with pytest.raises(ExportError, match="too large or no numbers"):
        calibration.moments(next(iter(calibration._gathered)))
