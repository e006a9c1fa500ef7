"""Measuring quality: draws that are the same model, requests that are divided, a peer with other products."""

import json
from pathlib import Path

import numpy as np
import pytest

from cpmbee import native
from cpmbee.bench.draws import redrawn
from cpmbee.bench.peers.dynamic_quantize import by_output, write_folder
from cpmbee.bench.peers.graph_rules import PEER_RULES
from cpmbee.bench.quality import compared, divided, reference, write_jsonl
from cpmbee.config import ModelConfig
from cpmbee.engine import Engine
from cpmbee.errors import ModelFolderError
from cpmbee.export import export
from cpmbee.export.onnx_model import OnnxModel
from cpmbee.export.quality import measure
from cpmbee.export.report import Quality
from cpmbee.export.sources import open_source
from cpmbee.export.transcripts import Transcript, make_transcript
from cpmbee.folder import open_folder
from cpmbee.model.tensor_names import expected_tensors, is_linear
from cpmbee.session import OrtBackend
from cpmbee.tokenizer import Tokenizer
from tests.export.cases import make_checkpoint
from tests.model.factory import tiny_config

TEXTS = ("今天天气", "abc", "天气真好")


def transcripts(checkpoint: Path, *, options: bool) -> list[Transcript]:
    tokenizer = Tokenizer.from_file(checkpoint / "vocab.txt")
    more = {"options": {"<option_0>": "a", "<option_1>": "b"}} if options else {}
    config = ModelConfig.from_file(checkpoint / "config.json")
    return [make_transcript({"input": text, **more, "<ans>": "b"}, tokenizer, config) for text in TEXTS]


def test_redrawn_model_is_the_same_model(tmp_path: Path) -> None:
    config = tiny_config(mask_modules=((False, False), (True, False), (False, True)), num_hidden_layers=3)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", config)
    asked = transcripts(checkpoint, options=True)
    other = redrawn(checkpoint, tmp_path / "other", 1)
    for ours, theirs in zip(reference(checkpoint, asked), reference(other, asked), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-2 * np.ptp(theirs))  # it is stored in fp16
    weights, redrawn_weights = open_source(checkpoint), open_source(other)
    for name in expected_tensors(config):
        if is_linear(name, weights.read(name).shape):
            changed = abs(redrawn_weights.read(name) / np.float32(1) - weights.read(name))
            assert (changed > 1e-3 * abs(weights.read(name))).mean() > 0.9, name


def test_divergence_is_compared_draw_by_draw() -> None:
    found = [Quality(1, 1, kl, 1.0, None, None) for kl in (2.0, 8.0)]
    assert compared(found, [4.0, 4.0]) == {
        "kl_draws": [2.0, 8.0],
        "kl_of_nearest": pytest.approx(1.0),
        "kl_of_nearest_error": pytest.approx(2.0),
    }
    assert compared(found, [2.0, 8.0])["kl_of_nearest"] is None


def test_requests_are_divided(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [{"n": 10 * n + i, "<ans>": "x"} for i in range(6)]) for n in (0, 1)]
    asked, calibration = divided(files, None, count=4)
    assert [request["n"] for request in asked] == [0, 4, 12]
    assert [request["n"] for request in calibration] == [1, 3, 5, 11, 13, 15]
    asked, calibration = divided(files[:1], files[1:], count=100)
    assert (len(asked), len(calibration)) == (6, 6)


def test_numbers_of_one_scale_per_output() -> None:
    matrix = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)
    matrix[3] = 0
    numbers, scales = by_output(matrix)
    assert (numbers.shape, numbers.dtype, scales.shape) == ((30, 40), np.int8, (40,))
    assert (np.abs(numbers.T * scales[:, None] - matrix) <= scales[:, None] / 2 + 1e-6).all()
    assert np.abs(numbers).max(0).tolist() == [127] * 3 + [0] + [127] * 36


def test_folder_with_other_products(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    export(checkpoint, tmp_path / "ours", "int8", block_size=32, verify=False)
    write_folder(tmp_path / "ours", tmp_path / "theirs")
    folder = open_folder(tmp_path / "theirs", verify_hashes=True, rules=PEER_RULES)
    with pytest.raises(ModelFolderError, match="not a graph that cpmbee export writes"):
        open_folder(tmp_path / "theirs")
    asked = transcripts(checkpoint, options=False)
    expected = reference(checkpoint, asked)
    rows = max(made.num_tokens for made in asked)
    model = OnnxModel(tmp_path / "theirs" / "model.onnx", rows, use_native=False)
    # Without VNNI, ONNX Runtime adds pairs of byte products in 16 bits, which saturate; ours do not.
    exact = "vnni" in native.kernels()["QuantizedLinear"]
    assert measure(model, asked, expected).kl < (1e-2 if exact else 0.5)
    engine = Engine(OrtBackend(folder, num_threads=1), Tokenizer.from_file(folder.vocabulary))
    assert engine.generate({"input": "abc", "<ans>": ""}, max_new_tokens=2)
    manifest = json.loads((tmp_path / "theirs" / "engine.json").read_text())
    assert "dynamic.data" in manifest["files"]
