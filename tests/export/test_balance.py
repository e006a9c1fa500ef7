"""Channels are evened out where it pays, without changing what a model computes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from cpmbee.bench.outlier_gains import PLACES, Place, with_outliers
from cpmbee.errors import ExportError
from cpmbee.export import export, exporter, verify
from cpmbee.export.balance import Balance, Factors, blocks_of, even_factors
from cpmbee.export.dequantized import DequantizedSource, check_weights, external_tensors, stored_quantization
from cpmbee.export.onnx_model import OnnxModel
from cpmbee.export.packing import BlockFormat
from cpmbee.export.sources import open_source
from cpmbee.export.weights import Precision
from cpmbee.folder import open_folder
from tests.export.cases import CACHE_ROWS, CONFIGS, make_checkpoint, make_folder, reference_calls
from tests.export.test_verification import rehash
from tests.model.factory import random_model, tiny_config, write_checkpoint

CONFIG = tiny_config(hidden_size=96, dim_ff=128, num_hidden_layers=2)


def unbalanced() -> AbstractContextManager[object]:
    return mock.patch.object(exporter, "Balance", return_value=None)


def error(checkpoint: Path, out: Path, precision: Precision) -> float:
    """Mean squared error of an export's logits."""
    export(checkpoint, out, precision, cache="fp32", verify=False, overwrite=True)
    calls = reference_calls(checkpoint)
    logits = OnnxModel(out / "model.onnx", CACHE_ROWS, use_native=False).run_all([call.inputs for call in calls])
    return float(np.mean([np.square(ours - call.logits).mean() for call, ours in zip(calls, logits, strict=True)]))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_outliers_cost_nothing(place: Place, precision: Precision, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", CONFIG)
    usual = error(checkpoint, tmp_path / "out", precision)
    outliers = with_outliers(checkpoint, tmp_path / "outliers", place, 1000)
    assert error(outliers, tmp_path / "out", precision) < 1.5 * usual
    with unbalanced():
        assert error(outliers, tmp_path / "out", precision) > 3 * usual


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_even_models_keep_their_bytes(precision: Precision, tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path, CONFIG, precision)
    with unbalanced():
        export(checkpoint, tmp_path / "other", precision, verify=False)
    assert (out / "model.onnx.data").read_bytes() == (tmp_path / "other" / "model.onnx.data").read_bytes()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["full", "pruned"])
def test_balanced_exports_are_verified(place: Place, name: str, tmp_path: Path) -> None:
    checkpoint = with_outliers(make_checkpoint(tmp_path / "even", CONFIGS[name]), tmp_path / "outliers", place, 1000)
    export(checkpoint, tmp_path / "out", "int4", block_size=32)
    source = dequantized(checkpoint, tmp_path / "out")
    factors = [source.factors(name) for name in source.quantized if name.startswith("encoder")]
    changed = np.concatenate([part for one in factors for part in one])
    assert changed.min() < 0.01 or changed.max() > 100
    assert (np.exp2(np.rint(np.log2(changed))) == changed).all()
    for name, bits in source.quantized.items():
        assert bits in (4, 8)
        exact = source.original(name)
        assert np.square(source.read(name) - exact).sum() < 0.1 * np.square(exact).sum()


def test_calibrated(tmp_path: Path) -> None:
    checkpoint = with_outliers(make_checkpoint(tmp_path / "even", CONFIG), tmp_path / "outliers", "norms", 64)
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"input": "abcdefgh", "<ans>": "bcd"}\n{"input": "today", "<ans>": "yes"}\n')
    report = export(checkpoint, tmp_path / "out", "int8", calibration=requests, verify=False)
    with unbalanced():
        other = export(checkpoint, tmp_path / "other", "int8", calibration=requests, verify=False)
    read_norms = [name for name in (m.name for m in report.matrices) if name.endswith(("qkv_weight", "in_weight"))]
    errors = [{m.name: m.error for m in r.matrices} for r in (report, other)]
    for name in read_norms:
        assert errors[0][name] < 2 * errors[1][name]
    assert check_weights(dequantized(checkpoint, tmp_path / "out"), lambda stage, fraction: None).passed
    verify(tmp_path / "out", checkpoint)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("change", [1.05, 0.5, -1.0])
def test_a_wrong_norm_is_not_taken_for_a_factor(precision: Precision, change: float, tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path, precision=precision)
    norm = external_tensors(out / "model.onnx")["layers.1.ffn/norm_weight"]
    data = np.memmap(out / "model.onnx.data", np.float32, "r+", norm.offset, norm.shape)  # type: ignore[attr-defined]
    data[3] *= change
    data.flush()
    rehash(out, "model.onnx.data")
    with pytest.raises(ExportError, match=r"weights|exact products"):
        verify(out, checkpoint)


def test_wrong_factors_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = with_outliers(make_checkpoint(tmp_path / "even"), tmp_path / "outliers", "norms", 64)
    right = Balance.norm
    monkeypatch.setattr(Balance, "norm", lambda self, name: np.roll(right(self, name), 1))
    with pytest.raises(ExportError, match="weights"):
        export(checkpoint, tmp_path / "out", "int8")


def test_inner_factors_that_are_not_undone_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = with_outliers(make_checkpoint(tmp_path / "even"), tmp_path / "outliers", "inner", 64)
    right = Balance.factors

    def wrong(self: Balance, name: str) -> Factors:
        found = right(self, name)
        return found._replace(columns=np.ones_like(found.columns)) if name.endswith("w_out.weight") else found

    monkeypatch.setattr(Balance, "factors", wrong)
    with pytest.raises(ExportError, match="weights"):
        export(checkpoint, tmp_path / "out", "int8")


def test_factors_are_powers_of_two_and_only_where_they_pay() -> None:
    rng = np.random.default_rng(0)
    layout = BlockFormat(8, 64)
    activations, weights = rng.uniform(0.5, 2, (2, 256))
    assert (even_factors(activations, weights, layout) == 1).all()
    activations[[3, 100]] *= 50
    weights[[3, 100]] /= 50
    activations[7] = weights[8] = 0
    factors = even_factors(activations, weights, layout)
    assert (np.exp2(np.rint(np.log2(factors))) == factors).all()
    assert factors[[3, 100]].min() >= 16
    assert factors[[7, 8]].tolist() == [1, 1]


@pytest.mark.parametrize("place", PLACES)
def test_dead_channels(place: Place, tmp_path: Path) -> None:
    model = random_model(CONFIG)
    with torch.no_grad():
        for block in blocks_of(CONFIG):
            model.get_parameter(block.norm if place == "norms" else block.inner)[:5] = 0
    export(write_checkpoint(tmp_path / "dead", model), tmp_path / "out", "int8")


def dequantized(checkpoint: Path, out: Path) -> DequantizedSource:
    model = open_folder(out)
    quantization = stored_quantization(model)
    assert quantization is not None
    return DequantizedSource(open_source(checkpoint), model, quantization)
