"""The exported graph computes what the reference computes: every shape of model, precision and optimization level."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from cpmbee import native
from cpmbee.config import ModelConfig
from cpmbee.export.comparison import BATCH, PROMPT, STEP, replay
from cpmbee.export.exporter import export
from cpmbee.export.onnx_model import OnnxModel
from cpmbee.export.weights import Precision
from tests.export.cases import CACHE_ROWS, CONFIGS, make_folder, reference_calls
from tests.golden import DATA, GOLDEN, requires_golden

LEVELS = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
needs_native = pytest.mark.skipif(native.library_path() is None, reason="the op library is not built")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_reference(name: str, precision: Precision, tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path, CONFIGS[name], precision, cache="fp32")
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    calls = reference_calls(checkpoint, precision)
    kinds = {call.kind for call in calls}
    assert kinds == {PROMPT, STEP, BATCH}
    runs = [(False, level) for level in LEVELS.values()] + [(True, LEVELS["all"])]
    for use_native, level in runs:
        model = OnnxModel(out / "model.onnx", CACHE_ROWS, use_native=use_native, level=level)
        checks = replay(model, calls, "exported", "reference")
        assert len(checks) == len(kinds)
        for check in checks:
            assert check.passed, (level, use_native, check)
            assert check.error is not None
            assert check.error < 2e-5  # far below the tolerance: nothing is systematically off


@needs_native
def test_native_kernel_runs_in_exported_graph(tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path)
    model = OnnxModel(out / "model.onnx", CACHE_ROWS, use_native=True)
    calls = reference_calls(checkpoint)
    before = native.call_counts()["BucketedAttention"]
    replay(model, calls, "exported", "reference")
    assert native.call_counts()["BucketedAttention"] - before == len(calls) * len(CONFIGS["full"].attention_layers)


def test_inputs_and_outputs(tmp_path: Path) -> None:
    _, out = make_folder(tmp_path, CONFIGS["pruned"])
    session = ort.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    kept = len(CONFIGS["pruned"].attention_layers)
    caches = {f"{kind}_cache.{n}": "tensor(float)" for n in range(kept) for kind in ("key", "value")}
    assert {i.name: i.type for i in session.get_inputs()} == {
        "input_ids": "tensor(int32)",
        "input_subs": "tensor(int32)",
        "relation": "tensor(int16)",
        "slots": "tensor(int32)",
        "new_slots": "tensor(int32)",
        "logits_index": "tensor(int32)",
        "ext_ids": "tensor(int32)",
        "ext_subs": "tensor(int32)",
        **caches,
    }
    assert [o.name for o in session.get_outputs()] == ["logits", *(f"present_{name}" for name in caches)]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_embedding_is_stored_once(precision: Precision, tmp_path: Path) -> None:
    config = CONFIGS["full"]
    _, out = make_folder(tmp_path, config, precision)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    shape = [config.vocab_size, config.hidden_size]
    assert [list(t.dims) for t in model.graph.initializer if config.vocab_size in t.dims] == [shape]


def test_tensors_are_aligned_to_pages(tmp_path: Path) -> None:
    _, out = make_folder(tmp_path)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    offsets = [int(e.value) for t in model.graph.initializer for e in t.external_data if e.key == "offset"]
    assert len(offsets) > 10
    assert all(offset % 4096 == 0 for offset in offsets)


@requires_golden
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("half", [False, True])
def test_embedding_is_the_recorded_one(half: bool, precision: Precision, tmp_path: Path) -> None:
    recorded = np.load(GOLDEN / "tiny" / "embedding.npz")
    expected = recorded["half" if half else "float"].astype(np.float32)
    other = recorded["float" if half else "half"].astype(np.float32)
    assert np.abs(expected - other).max() > 4e-3  # so that the tolerance below tells them apart
    config = _golden_config(tmp_path / "checkpoint", half)
    export(
        tmp_path / "checkpoint", tmp_path / "out", precision, vocab=DATA / "bee_vocab.txt", verify=False, cache="fp32"
    )
    for name, level in LEVELS.items():
        embedding = _embed(tmp_path / "out", recorded["ids"], recorded["subs"], config, level)
        np.testing.assert_allclose(embedding, expected, rtol=0, atol=2e-3 if half else 1e-6, err_msg=name)


def _golden_config(folder: Path, half: bool) -> ModelConfig:
    """A recorded checkpoint whose configuration says ``half``."""
    folder.mkdir()
    shutil.copy(GOLDEN / "tiny" / "pytorch_model.bin", folder)
    config = dataclasses.replace(ModelConfig.from_file(GOLDEN / "tiny" / "config.json"), half=half)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return config


def _embed(
    folder: Path, ids: np.ndarray, subs: np.ndarray, config: ModelConfig, level: ort.GraphOptimizationLevel
) -> np.ndarray:
    """The rotated embedding inside an exported graph: made an output."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    probe = "embed/rotated"
    model.graph.output.append(onnx.helper.make_tensor_value_info(probe, onnx.TensorProto.FLOAT, None))
    onnx.save(model, folder / "probe.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    session = ort.InferenceSession(str(folder / "probe.onnx"), options, providers=["CPUExecutionProvider"])
    tokens = ids.shape[1]
    slots = np.arange(1, tokens + 1, dtype=np.int32)[None]
    inputs = {
        "input_ids": ids,
        "input_subs": subs,
        "relation": np.zeros((1, tokens, tokens), np.int16),
        "slots": slots,
        "new_slots": slots,
        "logits_index": np.zeros((1, 1), np.int32),
        "ext_ids": np.zeros(0, np.int32),
        "ext_subs": np.zeros(0, np.int32),
    }
    row = (tokens + 1, config.num_attention_heads, config.dim_head)
    caches = {i.name: np.zeros(row, np.float32) for i in session.get_inputs() if "cache" in i.name}
    return np.asarray(session.run([probe], {**inputs, **caches})[0])
