"""Measuring quality: draws that are the same model, requests that are divided, a peer with other products."""

import json
from pathlib import Path

import numpy as np
import pytest

from cpmbee.bench.peers.dynamic_quantize import by_output, write_folder
from cpmbee.bench.quality import divided, reference, reordered, write_jsonl
from cpmbee.config import ModelConfig
from cpmbee.engine import Engine
from cpmbee.export import export
from cpmbee.export.onnx_model import OnnxModel
from cpmbee.export.quality import measure
from cpmbee.export.transcripts import Transcript, make_transcript
from cpmbee.folder import open_folder
from cpmbee.tokenizer import Tokenizer
from tests.export.cases import make_checkpoint

TEXTS = ("今天天气", "abc", "天气真好")


def transcripts(checkpoint: Path, *, options: bool) -> list[Transcript]:
    tokenizer = Tokenizer.from_file(checkpoint / "vocab.txt")
    more = {"options": {"<option_0>": "a", "<option_1>": "b"}} if options else {}
    config = ModelConfig.from_file(checkpoint / "config.json")
    return [make_transcript({"input": text, **more, "<ans>": "b"}, tokenizer, config) for text in TEXTS]


@pytest.mark.parametrize("hidden", [True, False])
def test_reordered_model_is_the_same_model(hidden: bool, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    asked = transcripts(checkpoint, options=not hidden)
    other = reordered(checkpoint, tmp_path / "other", 1, hidden=hidden)
    for ours, theirs in zip(reference(checkpoint, asked), reference(other, asked), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-2 * np.ptp(theirs))  # it is stored in fp16


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
    open_folder(tmp_path / "theirs", verify_hashes=True)
    asked = transcripts(checkpoint, options=False)
    expected = reference(checkpoint, asked)
    rows = max(made.num_tokens for made in asked)
    model = OnnxModel(tmp_path / "theirs" / "model.onnx", rows, use_native=False)
    assert measure(model, asked, expected).kl < 1e-2
    assert Engine.from_pretrained(tmp_path / "theirs").generate({"input": "abc", "<ans>": ""}, max_new_tokens=2)
    manifest = json.loads((tmp_path / "theirs" / "engine.json").read_text())
    assert "dynamic.data" in manifest["files"]
