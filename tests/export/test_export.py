"""What an export writes, from what, and what it refuses."""

import dataclasses
import hashlib
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cpmbee
from cpmbee.errors import CheckpointError, ConfigError, DependencyError, ExportError, VocabularyError
from cpmbee.export import export, quantize, weights
from cpmbee.export.onnx_model import OnnxModel
from cpmbee.export.weights import Precision
from cpmbee.folder import open_folder
from cpmbee.generation_config import GenerationConfig
from cpmbee.model import CpmBee, load_model, save_checkpoint
from tests.export.cases import make_checkpoint, make_folder, probes_for
from tests.golden import DATA, GOLDEN, requires_golden
from tests.model.factory import VOCABULARY, random_model, tiny_config, write_checkpoint, write_vocabulary

FILES = [
    "config.json",
    "engine.json",
    "export_report.json",
    "generation_config.json",
    "model.onnx",
    "model.onnx.data",
    "vocab.txt",
]


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "export_report.json"}


def test_folder_is_complete(tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path, precision="fp16")
    assert sorted(file.name for file in out.iterdir()) == FILES
    opened = open_folder(out, verify_hashes=True)
    assert opened.config == tiny_config()
    assert opened.generation_config == GenerationConfig()
    assert (out / "vocab.txt").read_bytes() == (checkpoint / "vocab.txt").read_bytes()
    assert json.loads((out / "config.json").read_text())["model_type"] == "cpmbee"


def test_manifest(tmp_path: Path) -> None:
    _, out = make_folder(tmp_path, precision="fp16")
    manifest = json.loads((out / "engine.json").read_text())
    assert manifest["format"] == "cpmbee-onnx"
    assert manifest["schema_version"] == 1
    assert manifest["precision"] == dict.fromkeys(["embedding", "attention", "ffn", "head"], "fp16")
    assert manifest["cache"] == {"num_layers": 3, "num_heads": 3, "dim_head": 8, "dtype": "float16"}
    assert manifest["ops"] == {"domain": "cpm_bee", "version": 3}
    assert manifest["created_with"]["cpmbee"] == cpmbee.__version__
    assert manifest["source"]["format"] == "safetensors"
    assert sorted(manifest["files"]) == [f for f in FILES if f not in ("engine.json", "export_report.json")]
    for name, entry in manifest["files"].items():
        content = (out / name).read_bytes()
        assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_export_is_reproducible(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    for out in ("a", "b"):
        export(checkpoint, tmp_path / out, verify=False)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_dialect_and_file_format_do_not_matter(tmp_path: Path) -> None:
    model = random_model()
    variants: list[dict[str, Any]] = [
        {"dialect": "original", "file_format": "bin"},
        {"dialect": "huggingface", "file_format": "safetensors"},
        {"dialect": "huggingface", "file_format": "safetensors", "max_shard_bytes": 20_000},
    ]
    written = []
    for i, options in enumerate(variants):
        checkpoint = write_checkpoint(tmp_path / f"checkpoint{i}", model, **options)
        export(checkpoint, tmp_path / f"out{i}", verify=False)
        files = files_of(tmp_path / f"out{i}")
        source = json.loads(files.pop("engine.json"))["source"]["sha256"]
        written.append((files, source))
    assert all(other == written[0] for other in written[1:])


def test_live_model(tmp_path: Path) -> None:
    model = random_model()
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    export(checkpoint, tmp_path / "from-file", verify=False)
    model.train()
    export(model, tmp_path / "live", vocab=checkpoint / "vocab.txt")
    assert model.training
    live, from_file = files_of(tmp_path / "live"), files_of(tmp_path / "from-file")
    assert live["model.onnx.data"] == from_file["model.onnx.data"]
    assert live["model.onnx"] == from_file["model.onnx"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_live_model_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    vocab = write_vocabulary(tmp_path / "vocab.txt")
    report = export(random_model(dtype=dtype), tmp_path / "out", "fp16", vocab=vocab)
    assert report.verification is not None
    assert report.verification.passed


@requires_golden
def test_lora_equals_the_merged_model(tmp_path: Path) -> None:
    delta, vocab = GOLDEN / "tiny" / "lora-delta.pt", DATA / "bee_vocab.txt"
    merged = load_model(GOLDEN / "tiny", lora=delta, lora_alpha=16)
    export(GOLDEN / "tiny", tmp_path / "delta", vocab=vocab, lora=delta, lora_alpha=16, verify=False)
    export(merged, tmp_path / "merged", vocab=vocab, verify=False)
    export(GOLDEN / "tiny", tmp_path / "plain", vocab=vocab, verify=False)
    with_delta, with_merged, plain = (files_of(tmp_path / name) for name in ("delta", "merged", "plain"))
    assert with_delta["model.onnx.data"] == with_merged["model.onnx.data"]
    assert with_delta["model.onnx.data"] != plain["model.onnx.data"]


def test_safetensors_without_torch(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("blocked", name="torch")
sys.meta_path.insert(0, Block())
from cpmbee.export import export
report = export({str(checkpoint)!r}, {str(tmp_path / "out")!r}, "fp16")
assert "torch" not in sys.modules
assert report.verification.passed
print(*report.verification.notes)
print(*(check.name for check in report.verification.checks), sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "PyTorch reference not run: torch is not installed" in done.stdout
    export(checkpoint, tmp_path / "with-torch", "fp16", verify=False)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "with-torch")


def test_onnx_missing_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n == "onnx" or n.startswith("cpmbee.export.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(DependencyError, match=r"cpmbee\[export\]"):
        cpmbee.export.export  # noqa: B018


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_memory_stays_small(precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [f"word{i}" for i in range(20_000)]
    config = tiny_config(
        vocab_size=len(VOCABULARY) + len(words), hidden_size=256, dim_ff=1024, num_attention_heads=8, dim_head=32
    )
    config = dataclasses.replace(config, num_hidden_layers=8)
    checkpoint = tmp_path / "checkpoint"
    save_checkpoint(random_model(config), checkpoint, file_format="safetensors")
    (checkpoint / "vocab.txt").write_text("".join(f"{token}\n" for token in [*VOCABULARY, *words]))
    monkeypatch.setattr(weights, "CHUNK_BYTES", 1 << 20)
    monkeypatch.setattr(quantize, "PANEL_BYTES", 1 << 18)

    def forget_the_vocabulary(stage: str, fraction: float) -> None:
        if fraction == 0:
            tracemalloc.reset_peak()

    tracemalloc.start()
    try:
        report = export(checkpoint, tmp_path / "out", precision, verify=False, progress=forget_the_vocabulary)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.num_parameters * 4 > 40e6
    assert peak < 4e6  # the largest matrix has 2 MB in fp32


def test_vocabulary_is_required(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match="--vocab"):
        export(random_model(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vocabulary_has_to_fit(tmp_path: Path) -> None:
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("".join(f"{token}\n" for token in [*VOCABULARY, "more"]))
    size = len(VOCABULARY)
    with pytest.raises(VocabularyError, match=f"{size + 1} tokens, the model has {size}"):
        export(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "out", vocab=vocab)
    assert not (tmp_path / "out").exists()


def test_unknown_precision(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fp32, fp16"):
        export(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "out", "int3")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["input_embedding.weight", "encoder.layers.1.ffn.ffn.w_out.weight"])
@pytest.mark.parametrize("live", [False, True])
def test_value_that_is_not_a_number(name: str, live: bool, tmp_path: Path) -> None:
    model = random_model()
    with torch.no_grad():
        model.get_parameter(name)[3, 4] = float("nan")
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    source: CpmBee | Path = model if live else checkpoint
    with pytest.raises(CheckpointError, match=rf"{name}: value at \[3, 4\]"):
        export(source, tmp_path / "out", vocab=checkpoint / "vocab.txt")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["checkpoint"]


def test_value_too_large_for_fp16(tmp_path: Path) -> None:
    model = random_model()
    with torch.no_grad():
        model.get_parameter("encoder.layers.0.ffn.ffn.w_out.weight")[0, 0] = 1e5
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn\.ffn\.w_out\.weight: has values that fp16 cannot hold"):
        export(checkpoint, tmp_path / "out", "fp16", verify=False)
    export(checkpoint, tmp_path / "out", "fp32", verify=False)


def test_checkpoint_that_lies_about_its_shape(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "dim_ff": 32}))
    with pytest.raises(CheckpointError, match="w_in"):
        export(checkpoint, tmp_path / "out")


def test_alpha_without_a_delta(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no LoRA delta"):
        export(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "out", lora_alpha=16)
    assert not (tmp_path / "out").exists()


def test_lora_delta_for_a_live_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="merge it into the live model"):
        export(random_model(), tmp_path / "out", lora=tmp_path / "delta.pt")


def test_target_that_exists(tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path)
    with pytest.raises(ExportError, match="already exists"):
        export(checkpoint, out)
    before = files_of(out)
    export(checkpoint, out, "fp16", overwrite=True, verify=False)
    assert files_of(out) != before


def test_progress_goes_up(tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    export(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "out", progress=lambda *now: told.append(now))
    stages = dict.fromkeys(stage for stage, _ in told)
    assert next(iter(stages)) == "writing tensors"
    assert len(stages) > 2
    for stage in stages:
        fractions = [fraction for told_stage, fraction in told if told_stage == stage]
        assert fractions == sorted(fractions)
        assert all(0 <= fraction <= 1 for fraction in fractions)


def test_exported_model_is_deterministic_across_sessions(tmp_path: Path) -> None:
    _, out = make_folder(tmp_path)
    inputs = probes_for(out)[0].inputs(0, [])
    first, second = (OnnxModel(out / "model.onnx", 256, use_native=False).run(inputs) for _ in range(2))
    np.testing.assert_array_equal(first, second)
