"""Layers whose activations stay fp32: they compute exactly, load like others, and are found where they are needed."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest
import torch

from cpmbee import native
from cpmbee.engine import Engine
from cpmbee.errors import ConfigError
from cpmbee.export import cli, export, exporter, verify
from cpmbee.export.activation_errors import layer_errors
from cpmbee.export.exact_model import ExactModel
from cpmbee.export.onnx_model import OnnxModel
from cpmbee.export.packing import BLOCK_SIZES
from cpmbee.export.weights import Precision
from cpmbee.tokenizer import Tokenizer
from tests.export.cases import CACHE_ROWS, CONFIGS, make_checkpoint, make_folder, reference_calls
from tests.model.factory import random_model, tiny_config, write_checkpoint

KERNELS = [False] if native.library_path() is None else [False, True]


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_nothing_is_rounded_in_exact_layers(precision: Precision, block_size: int, tmp_path: Path) -> None:
    """But in the head, whose rows are compared with exact products of their own."""
    config = tiny_config(num_hidden_layers=2)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", config)
    calls = reference_calls(checkpoint)
    inputs = [call.inputs for call in calls]
    errors = []
    for layers in ((), (0,), (0, 1)):
        out = tmp_path / f"out{len(layers)}"
        export(checkpoint, out, precision, block_size=block_size, cache="fp32", exact_activations=layers, verify=False)
        exact = list(ExactModel(out / "model.onnx").run_all(inputs))
        for use_native in KERNELS:
            ours = OnnxModel(out / "model.onnx", CACHE_ROWS, use_native=use_native).run_all(inputs)
            head = [call.logits.shape[-1] - len(call.inputs.ext_ids) for call in calls]
            # Extension tokens are not multiplied by the quantized head, so they show the layers alone.
            pairs = [(a[..., n:], b[..., n:]) for a, b, n in zip(ours, exact, head, strict=True)]
            errors.append(max(float(np.abs(a - b).max()) / float(np.ptp(b)) for a, b in pairs))
    assert errors[-1] < 1e-5
    assert errors[0] > errors[len(KERNELS)] > 20 * errors[-1]
    verify(tmp_path / "out2", checkpoint)
    assert Engine.from_pretrained(tmp_path / "out2").generate({"input": "今天", "<ans>": ""}, max_new_tokens=2)


def test_manifest_and_graph(tmp_path: Path) -> None:
    _, out = make_folder(tmp_path, CONFIGS["pruned"], "int4", exact_activations=[3, 1])
    assert json.loads((out / "engine.json").read_text())["quantization"]["exact_layers"] == [1, 3]
    nodes = onnx.load(out / "model.onnx", load_external_data=False).graph.node
    exact = {node.output[0].rpartition("/")[0] for node in nodes if node.op_type == "ExactLinear"}
    assert exact == {scope for scope in exact if scope.startswith(("layers.1.", "layers.3."))} != set()
    assert not any(
        node.op_type == "QuantizedLinear" and node.output[0].startswith(("layers.1.", "layers.3.")) for node in nodes
    )


def test_auto_finds_the_layer_that_rounding_spoils(tmp_path: Path) -> None:
    model = random_model(tiny_config(num_hidden_layers=5))
    with torch.no_grad():  # the same function, but for one channel that nothing evens out here
        model.get_parameter("encoder.layers.2.ffn.layernorm_before_ffn.weight")[3] *= 3000
        for part in ("w_0", "w_1"):
            model.get_parameter(f"encoder.layers.2.ffn.ffn.w_in.{part}.weight")[:, 3] /= 3000
    checkpoint = write_checkpoint(tmp_path / "checkpoint", model)
    tokenizer = Tokenizer.from_file(checkpoint / "vocab.txt")
    export(checkpoint, tmp_path / "even", "int8", exact_activations="auto")
    assert "exact_layers" not in json.loads((tmp_path / "even" / "engine.json").read_text())["quantization"]
    with mock.patch.object(exporter, "Balance", return_value=None):
        export(checkpoint, tmp_path / "uneven", "int8", exact_activations="auto")
    assert json.loads((tmp_path / "uneven" / "engine.json").read_text())["quantization"]["exact_layers"] == [2]
    errors = layer_errors(tmp_path / "uneven" / "model.onnx", model.config, tokenizer)
    assert errors.index(max(errors)) == 2


def test_layers_that_do_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match="there is no layer 3; the model has 0 to 2"):
        export(checkpoint, tmp_path / "out", "int8", exact_activations=[1, 3])
    with pytest.raises(ConfigError, match="exact activations are for int8 and int4, not for fp16"):
        export(checkpoint, tmp_path / "out", "fp16", exact_activations=[1])
    with pytest.raises(SystemExit):
        cli.export_main([str(checkpoint), str(tmp_path / "out"), "--precision", "int8", "--exact-activations", "x"])
    assert "--exact-activations takes numbers of layers, or auto alone, not 'x'" in capsys.readouterr().err
    arguments = ["--precision", "int8", "--exact-activations", "0", "2", "--no-verify"]
    assert cli.export_main([str(checkpoint), str(tmp_path / "out"), *arguments]) == 0
    assert json.loads((tmp_path / "out" / "engine.json").read_text())["quantization"]["exact_layers"] == [0, 2]
