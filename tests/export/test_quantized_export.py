"""Quantized folders: what is in them, and that they compute what their numbers mean."""

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from cpmbee import native
from cpmbee.engine import Engine
from cpmbee.errors import CheckpointError, ConfigError, ExportError, ModelFolderError
from cpmbee.export import export, pieces, verification, verify, weights
from cpmbee.export import quantize as quantize_module
from cpmbee.export.comparison import Call, record, replay
from cpmbee.export.dequantized import DequantizedSource, check_weights, external_tensors, stored_quantization
from cpmbee.export.divergence import Rounding
from cpmbee.export.exact_model import ExactModel
from cpmbee.export.onnx_model import OnnxModel
from cpmbee.export.packing import BLOCK_SIZES
from cpmbee.export.reference_loading import ReferenceModel, load_reference
from cpmbee.export.rounded_model import RoundedModel
from cpmbee.export.sources import open_source
from cpmbee.export.verification import examine
from cpmbee.export.weights import Precision
from cpmbee.folder import open_folder
from tests.export.cases import CACHE_ROWS, CONFIGS, make_checkpoint, make_folder, probes_for
from tests.export.test_verification import rehash
from tests.golden import DATA, GOLDEN, requires_golden
from tests.model.factory import random_model, tiny_config, write_checkpoint

needs_native = pytest.mark.skipif(native.library_path() is None, reason="the op library is not built")
every_precision = pytest.mark.parametrize("precision", ["int8", "int4"])
BLOCKS = {32: "full", 64: "pruned", 128: "half"}  # a model for each


def dequantized(checkpoint: Path, out: Path) -> DequantizedSource:
    model = open_folder(out)
    quantization = stored_quantization(model)
    assert quantization is not None
    return DequantizedSource(open_source(checkpoint), model, quantization)


def dequantized_calls(checkpoint: Path, out: Path) -> list[Call]:
    """What the reference computes on the file's weights."""
    model = load_reference(dequantized(checkpoint, out), "fp32")
    return record(ReferenceModel(model, CACHE_ROWS), probes_for(checkpoint), steps=3)


@pytest.mark.parametrize(("embedding", "block_size"), [("int8", None), ("int8", 48), ("fp16", 64)])
def test_a_manifest_that_does_not_say_how(small_folder: Path, embedding: str, block_size: int | None) -> None:
    precision = {"attention": "int4", "embedding": embedding}
    with pytest.raises(ModelFolderError, match="says int4, but not how"):
        stored_quantization(replace(open_folder(small_folder), precision=precision, block_size=block_size))


@every_precision
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_dequantized_reference(
    name: str, precision: Precision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, out = make_folder(tmp_path, CONFIGS[name], precision, block_size=32)
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    calls = dequantized_calls(checkpoint, out)
    for budget in (1, pieces.PIECE_BYTES):  # every product alone, all at once
        monkeypatch.setattr(pieces, "PIECE_BYTES", budget)
        for check in replay(ExactModel(out / "model.onnx"), calls, "exact", "reference"):
            assert check.error is not None
            assert check.error < 2e-5, check
    inputs = [call.inputs for call in calls]
    rounding = Rounding(calls, list(RoundedModel(out / "model.onnx", "fp16").run_all(inputs)))
    for use_native in _both():
        model = OnnxModel(out / "model.onnx", CACHE_ROWS, use_native=use_native)
        for check in rounding.compare(model.run_all(inputs), "rounded", "reference"):
            assert check.passed, check


@needs_native
@every_precision
@pytest.mark.parametrize(("block_size", "name"), BLOCKS.items())
@pytest.mark.parametrize("head_bits", [4, 8])
def test_right_exports_pass(block_size: int, name: str, head_bits: int, precision: Precision, tmp_path: Path) -> None:
    checkpoint, out = make_folder(
        tmp_path, CONFIGS[name], precision, block_size=block_size, head_bits=head_bits, method="nearest"
    )
    report = verify(out, checkpoint)
    names = {check.name.partition(",")[0] for check in report.checks}
    assert {"weights", "prompt logits", "cached step logits", "padded batch logits", "greedy answers"} < names
    assert {check.name.partition(", ")[2] for check in report.checks} == {
        "",
        "exact products",
        "native kernels",
        "function bodies",
    }


@needs_native
def test_native_kernel_runs(tmp_path: Path) -> None:
    _, out = make_folder(tmp_path, precision="int4")
    engine = Engine.from_pretrained(out)
    assert engine.native_ops["QuantizedLinear"] != "function"
    before = native.call_counts()["QuantizedLinear"]
    engine.generate({"input": "今天", "<ans>": ""}, max_new_tokens=2)
    assert native.call_counts()["QuantizedLinear"] - before == 2 * (4 * 3 + 1)


@requires_golden
@every_precision
def test_recorded_checkpoint_passes(precision: Precision, tmp_path: Path) -> None:
    report = export(GOLDEN / "tiny-ext", tmp_path / "out", precision, vocab=DATA / "bee_vocab.txt", block_size=32)
    assert report.verification is not None
    assert report.verification.passed
    written = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert [matrix["name"] for matrix in written["matrices"]] == [matrix.name for matrix in report.matrices]
    assert report.matrices[0].name == "embedding"
    assert all(0 < matrix.error < (0.02 if matrix.bits == 8 else 0.2) for matrix in report.matrices)


@pytest.mark.parametrize(("precision", "head_bits"), [("int8", 8), ("int4", 8), ("int4", 4)])
def test_embedding_is_stored_once_and_files_have_the_size_of_their_bits(
    precision: Precision, head_bits: int, tmp_path: Path
) -> None:
    config = tiny_config(hidden_size=256, dim_ff=512, num_attention_heads=4, dim_head=64)
    _, out = make_folder(tmp_path, config, precision, head_bits=head_bits, block_size=64)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    groups = -(-config.vocab_size // 16)
    large = {t.name: list(t.dims) for t in model.graph.initializer if t.dims and t.dims[0] == groups}
    assert large == {
        "embedding": [groups, 256 * head_bits // 32, 16, 4],
        "embedding/scales": [groups, 4, 16],
    }
    readers = [node.op_type for node in model.graph.node if "embedding" in node.input]
    assert sorted(readers) == ["QuantizedEmbedding", "QuantizedEmbedding", "QuantizedLinear"]
    body_bits = 8 if precision == "int8" else 4
    body = config.num_hidden_layers * 256 * (4 * 256 + 3 * 512)
    expected = body * (body_bits / 8 + 2 / 64) + groups * 16 * 256 * (head_bits / 8 + 2 / 64)
    small = sum(t.nbytes for name, t in external_tensors(out / "model.onnx").items() if t.dtype == np.float32)
    assert sum(t.nbytes for t in external_tensors(out / "model.onnx").values()) == expected + small
    assert (out / "model.onnx.data").stat().st_size - expected - small < 4096 * len(model.graph.initializer)


@pytest.mark.parametrize(
    ("precision", "options", "groups", "quantization"),
    [
        ("int8", {}, ("int8", "int8"), {"block_size": 64, "method": "search", "calibrated": False}),
        ("int4", {}, ("int8", "int4"), {"block_size": 64, "method": "search", "calibrated": False}),
        (
            "int4",
            {"head_bits": 4, "block_size": 32, "method": "nearest"},
            ("int4", "int4"),
            {"block_size": 32, "method": "nearest", "calibrated": False},
        ),
    ],
)
def test_manifest(
    precision: Precision,
    options: dict[str, Any],
    groups: tuple[str, str],
    quantization: dict[str, Any],
    tmp_path: Path,
) -> None:
    _, out = make_folder(tmp_path, precision=precision, **options)
    manifest = json.loads((out / "engine.json").read_text())
    head, body = groups
    assert manifest["precision"] == {"embedding": head, "attention": body, "ffn": body, "head": head}
    assert manifest["quantization"] == {**quantization, "activations": "int8"}
    assert open_folder(out, verify_hashes=True).precision["ffn"] == body


@every_precision
def test_weights_come_back_under_the_checkpoints_names(precision: Precision, tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path, CONFIGS["pruned"], precision, block_size=32)
    source = dequantized(checkpoint, out)
    bits = 8 if precision == "int8" else 4
    assert source.quantized["input_embedding.weight"] == 8
    assert source.quantized["encoder.layers.0.ffn.ffn.w_in.w_1.weight"] == bits
    for name, stored_bits in source.quantized.items():
        exact, rounded = source.original(name), source.read(name)
        assert rounded.shape == exact.shape
        assert np.abs(rounded - exact).max() < (0.02 if stored_bits == 8 else 0.25) * np.abs(exact).max()
    norm = "encoder.output_layernorm.weight"
    np.testing.assert_array_equal(source.read(norm), source.original(norm))
    assert check_weights(source, lambda stage, fraction: None).passed


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_half_precision_checkpoint_gives_the_same_bytes_without_a_compiler(
    block_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpmbee.export import plain_quantize

    checkpoint = write_checkpoint(tmp_path / "checkpoint", random_model(dtype=torch.float16))
    export(checkpoint, tmp_path / "a", "int4", block_size=block_size, verify=False)
    monkeypatch.setattr(quantize_module, "quantize", plain_quantize.quantize)
    monkeypatch.setattr(quantize_module, "widen", plain_quantize.widen)
    export(checkpoint, tmp_path / "b", "int4", block_size=block_size, verify=False)
    assert (tmp_path / "a" / "model.onnx.data").read_bytes() == (tmp_path / "b" / "model.onnx.data").read_bytes()


def test_wrong_fold_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    monkeypatch.setattr(weights, "RESIDUAL_SCALE", 1.06)
    with pytest.raises(ExportError, match="prompt logits, exact products"):
        export(checkpoint, tmp_path / "out", "int8")


def test_altered_numbers_are_found(tmp_path: Path) -> None:
    checkpoint, out = make_folder(tmp_path, precision="int8")
    tensor = external_tensors(out / "model.onnx")["layers.1.ffn/out_weight"]
    data = bytearray((out / "model.onnx.data").read_bytes())
    data[tensor.offset : tensor.offset + tensor.nbytes] = np.random.default_rng(0).bytes(tensor.nbytes)  # type: ignore[attr-defined]
    (out / "model.onnx.data").write_bytes(data)
    rehash(out, "model.onnx.data")
    report = examine(out, checkpoint)
    assert "weights" in {check.name for check in report.checks if not check.passed}


@needs_native  # without the library there is one note more
def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, out = make_folder(tmp_path, precision="int4")
    monkeypatch.setattr(verification, "available_memory", lambda: 1000)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)
    report = verify(out, checkpoint)
    kinds = {check.name.partition(", ")[::2] for check in report.checks if ", " in check.name}
    logits = {"prompt logits", "cached step logits", "padded batch logits"}
    rounding = {("tokens", "native kernels"), ("tokens", "function bodies")}
    assert kinds == rounding | set(itertools.product(logits, ("exact products", "native kernels", "function bodies")))
    assert len(report.notes) == 1


@pytest.mark.parametrize(
    "options", [{"block_size": 16}, {"head_bits": 5}, {"method": "best"}, {"calibration": "no-such-file.jsonl"}]
)
def test_options_that_do_not_exist(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be one of|cannot read"):
        export(make_checkpoint(tmp_path / "checkpoint"), tmp_path / "out", "int4", **options)
    assert not (tmp_path / "out").exists()


def test_values_that_scales_cannot_hold(tmp_path: Path) -> None:
    model = random_model()
    with torch.no_grad():
        model.get_parameter("encoder.layers.0.ffn.ffn.w_out.weight")[0, 0] = 1e20
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn\.ffn\.w_out\.weight: has values that quantized"):
        export(checkpoint, tmp_path / "out", "int8", verify=False)


def test_without_torch(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"input": "abc", "<ans>": "a"}\n')
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("blocked", name="torch")
sys.meta_path.insert(0, Block())
from cpmbee.errors import DependencyError
from cpmbee.export import export
report = export({str(checkpoint)!r}, {str(tmp_path / "out")!r}, "int4", quality={str(requests)!r})
print(*report.verification.notes, sep="\\n")
try:
    export({str(checkpoint)!r}, {str(tmp_path / "other")!r}, "int4", calibration={str(requests)!r})
except DependencyError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "PyTorch reference not run: torch is not installed" in done.stdout
    assert "quality not measured" in done.stdout
    assert "calibration needs torch" in done.stdout
    export(checkpoint, tmp_path / "with-torch", "int4", verify=False)
    assert (tmp_path / "out/model.onnx.data").read_bytes() == (tmp_path / "with-torch/model.onnx.data").read_bytes()


def test_bodies_run_on_an_empty_extension_vocabulary(tmp_path: Path) -> None:
    _, out = make_folder(tmp_path, precision="int4")
    for use_native in _both():
        engine = Engine.from_pretrained(out, native=use_native)
        plain, special = engine.generate(
            [{"input": "ab", "<ans>": ""}, {"input": "<x_1><x_2>", "<ans>": ""}], max_new_tokens=3
        )
        assert plain.usage.completion_tokens == special.usage.completion_tokens


def _both() -> Iterator[bool]:
    yield False
    if native.library_path() is not None:
        yield True
