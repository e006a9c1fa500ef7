"""Caches in fewer bits: what the folder says, what its graph wants, and that it still computes what the model means."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import cpmbee
from cpmbee import native
from cpmbee.cache_types import CACHE_TYPES, CacheType
from cpmbee.export import cli
from cpmbee.export.comparison import replay
from cpmbee.export.divergence import Rounding
from cpmbee.export.exact_model import ExactModel
from cpmbee.export.exporter import export
from cpmbee.export.onnx_model import OnnxModel
from cpmbee.export.probes import Probe
from cpmbee.export.rounded_model import RoundedModel
from cpmbee.export.verification import examine
from cpmbee.export.weights import PRECISIONS, Precision
from cpmbee.folder import open_folder
from tests.export.cases import CACHE_ROWS, CONFIGS, make_checkpoint, make_folder, probes_for, reference_calls

REDUCED: tuple[CacheType, ...] = ("fp16", "int8")
KERNELS = [False] if native.library_path() is None else [False, True]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_default(tmp_path: Path, precision: Precision) -> None:
    _, out = make_folder(tmp_path, precision=precision)
    assert open_folder(out).cache == ("fp32" if precision == "fp32" else "fp16")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    assert cli.export_main([str(checkpoint), str(tmp_path / "out"), "--cache", "int8"]) == 0
    assert "in fp32, cache in int8" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "engine.json").read_text())["cache"]["dtype"] == "int8"
    assert json.loads((tmp_path / "out" / "export_report.json").read_text())["cache"] == "int8"
    with pytest.raises(cpmbee.ConfigError, match="cache must be one of fp32, fp16, int8, not 'int4'"):
        export(checkpoint, tmp_path / "other", cache="int4")  # type: ignore[arg-type]


@pytest.mark.parametrize("cache", REDUCED)
@pytest.mark.parametrize("name", ["full", "pruned", "no attention", "last attention pruned"])
def test_logits(tmp_path: Path, name: str, cache: CacheType) -> None:
    checkpoint, out = make_folder(tmp_path, CONFIGS[name], cache=cache)
    calls = reference_calls(checkpoint)
    for check in replay(ExactModel(out / "model.onnx"), calls, "exact", "reference"):
        assert check.passed, check
    logits = []
    inputs = [call.inputs for call in calls]
    rounding = Rounding(calls, list(RoundedModel(out / "model.onnx", cache).run_all(inputs)))
    for use_native in KERNELS:
        model = OnnxModel(out / "model.onnx", CACHE_ROWS, use_native=use_native)
        for check in rounding.compare(model.run_all(inputs), "rounded", "reference"):
            assert check.passed, check
        model = OnnxModel(out / "model.onnx", CACHE_ROWS, use_native=use_native)
        logits.append(list(model.run_all([call.inputs for call in calls])))
    for bodies, kernels in zip(logits[0], logits[-1], strict=True):
        np.testing.assert_allclose(kernels, bodies, atol=2e-3 if cache == "fp16" else 2e-2)


@pytest.mark.parametrize("cache", CACHE_TYPES)
@pytest.mark.parametrize("use_native", KERNELS)
def test_how_a_prompt_is_split_changes_nothing(tmp_path: Path, cache: CacheType, use_native: bool) -> None:
    """Prefill attends to what the cache holds, not to the unrounded rows that are at hand."""
    _, out = make_folder(tmp_path, cache=cache)

    def last_logits(probe: Probe, cuts: list[int]) -> np.ndarray:
        model = OnnxModel(out / "model.onnx", CACHE_ROWS, use_native=use_native)
        for start, end in pairwise(cuts):
            whole = probe.inputs(start, [])
            new = end - start
            logits = model.run(
                whole._replace(
                    input_ids=whole.input_ids[:, :new],
                    input_subs=whole.input_subs[:, :new],
                    relation=whole.relation[:, :new, :end].copy(),
                    slots=whole.slots[:, :end],
                    new_slots=whole.new_slots[:, :new],
                    logits_index=np.array([[new - 1]], np.int32),
                )
            )
        return logits[0, 0]

    # Answers are causal, so only there may a prompt be cut.
    probe = probes_for(out)[0]
    prompt = len(probe) - 1
    for token in range(5, 17):
        probe.append((token, 0))
    end = len(probe)
    whole = last_logits(probe, [0, end])
    for cuts in ([0, prompt, end], [0, prompt + 3, end - 1, end], [0, *range(prompt, end + 1)]):
        split = last_logits(probe, cuts)
        np.testing.assert_allclose(split, whole, atol={"fp32": 2e-5, "fp16": 5e-4, "int8": 5e-3}[cache])


@pytest.mark.parametrize("cache", REDUCED)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_verification(tmp_path: Path, precision: Precision, cache: CacheType) -> None:
    checkpoint, out = make_folder(tmp_path, precision=precision, cache=cache)
    report = examine(out, checkpoint)
    assert report.passed, report
    exact = "exact cache" if precision == "fp16" else "exact products"
    assert {check.tolerance for check in report.checks if check.name.endswith(exact)} == {1e-4}


def test_verification_refuses_a_folder_whose_cache_rounds_more_than_it_says(tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path, cache="fp32")
    export(checkpoint, tmp_path / "int8", cache="int8", verify=False)
    manifest = json.loads((tmp_path / "int8" / "engine.json").read_text())
    manifest["cache"] = json.loads((out / "engine.json").read_text())["cache"]
    (tmp_path / "int8" / "engine.json").write_text(json.dumps(manifest))
    with pytest.raises(cpmbee.ModelFolderError, match=r"the graph has an input too many, key_scales\.0"):
        examine(tmp_path / "int8", checkpoint)
