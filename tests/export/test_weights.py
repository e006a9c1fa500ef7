"""Every fold, undone: what is stored gives the checkpoint back."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import numpy_helper

from cpmbee.errors import CheckpointError
from cpmbee.export import weights
from cpmbee.export.exporter import export
from cpmbee.export.weights import Precision
from cpmbee.model.tensor_names import expected_tensors
from tests.export.cases import CONFIGS
from tests.model.factory import random_model, tensors_of, tiny_config, write_checkpoint

Array = npt.NDArray[np.float32]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_stored_tensors_give_the_checkpoint_back(precision: Precision, tmp_path: Path) -> None:
    config = CONFIGS["pruned"]
    model = random_model(config, dtype=torch.float16)
    write_checkpoint(tmp_path / "checkpoint", model)
    export(tmp_path / "checkpoint", tmp_path / "out", precision, verify=False)
    stored = _read(tmp_path / "out")
    restored = _unfolded(stored, precision)
    original = tensors_of(model)
    assert restored.keys() == expected_tensors(config).keys()
    for name, tensor in restored.items():
        if precision == "fp16" and original[name].ndim == 2:
            np.testing.assert_array_equal(tensor, original[name], err_msg=name)  # bit for bit
        else:
            np.testing.assert_allclose(tensor, original[name], rtol=3e-7, atol=0, err_msg=name)


def test_fp16_file_has_half_the_size(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", random_model(tiny_config(hidden_size=512, dim_ff=1024)))
    sizes = {}
    for precision in weights.PRECISIONS:
        export(checkpoint, tmp_path / precision, precision, verify=False)
        sizes[precision] = (tmp_path / precision / "model.onnx.data").stat().st_size
    assert 0.49 < sizes["fp16"] / sizes["fp32"] < 0.53


def test_bfloat16_checkpoint(tmp_path: Path) -> None:
    model = random_model(dtype=torch.bfloat16)
    write_checkpoint(tmp_path / "checkpoint", model)
    export(tmp_path / "checkpoint", tmp_path / "out", "fp32", verify=False)
    restored = _unfolded(_read(tmp_path / "out"), "fp32", CONFIGS["full"])
    for name, tensor in tensors_of(model).items():
        np.testing.assert_allclose(restored[name], tensor, rtol=3e-7, atol=0, err_msg=name)


def test_scaling_by_one_changes_no_bit() -> None:
    array = np.array([1.1, -0.0, 65504, 6e-8], np.float16)
    assert weights.scaled(array, 1.0, np.dtype(np.float16)).tobytes() == array.tobytes()


def test_overflow_of_fp16_is_an_error() -> None:
    with pytest.raises(OverflowError, match="65504"):
        weights.scaled(np.array([7e4], np.float32), 1.0, np.dtype(np.float16))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_values_that_are_not_finite_are_found(
    bad: float, dtype: npt.DTypeLike, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "CHUNK_BYTES", 64)  # several pieces
    tensor = np.full((100, 4), np.finfo(dtype).max, dtype)
    weights.require_finite("w", tensor)
    tensor[77, 2] = bad
    with pytest.raises(CheckpointError, match=r"w: value at \[77, 2\]"):
        weights.require_finite("w", tensor)


@pytest.mark.parametrize("half", [False, True])
def test_frequencies_are_those_of_torch(half: bool) -> None:
    dim = 2048
    frequencies = weights.frequencies(tiny_config(hidden_size=dim, half=half))
    expected = 1.0 / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    expected = expected.half().float() if half else expected
    np.testing.assert_allclose(frequencies, expected, rtol=1e-3 if half else 2e-7)
    assert (frequencies == expected.numpy()).mean() > 0.97


def _read(folder: Path) -> dict[str, Array]:
    model = onnx.load(folder / "model.onnx")
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def _unfolded(
    stored: dict[str, Array], precision: Precision, config: weights.ModelConfig = CONFIGS["pruned"]
) -> dict[str, Array]:
    """The checkpoint's tensors out of the file's."""
    folded = precision == "fp32"
    root = config.hidden_size**0.5
    found = {
        "input_embedding.weight": stored["embedding"] * (root if folded else 1),
        "position_bias.relative_attention_bias": stored["position_bias"],
        "encoder.output_layernorm.weight": stored["head/norm_weight"] * (1 if folded else root),
    }
    blocks = 0
    for layer in range(config.num_hidden_layers):
        prefix = f"encoder.layers.{layer}"
        if layer in config.attention_layers:
            scope, source = f"layers.{layer}.attention", f"{prefix}.self_att"
            found[f"{source}.layernorm_before_attention.weight"] = stored[f"{scope}/norm_weight"] * root
            for part, matrix in zip("qkv", np.split(stored[f"{scope}/qkv_weight"], 3, axis=1), strict=True):
                found[f"{source}.self_attention.project_{part}.weight"] = matrix.T
            factor = config.attention_dim**0.5 / 1.05**blocks if folded else 1
            found[f"{source}.self_attention.attention_out.weight"] = stored[f"{scope}/out_weight"].T * factor
            blocks += 1
        if layer in config.ffn_layers:
            scope, source = f"layers.{layer}.ffn", f"{prefix}.ffn"
            found[f"{source}.layernorm_before_ffn.weight"] = stored[f"{scope}/norm_weight"] * root
            for part, matrix in enumerate(np.split(stored[f"{scope}/in_weight"], 2, axis=1)):
                found[f"{source}.ffn.w_in.w_{part}.weight"] = matrix.T
            factor = config.dim_ff**0.5 / 1.05**blocks if folded else 1
            found[f"{source}.ffn.w_out.weight"] = stored[f"{scope}/out_weight"].T * factor
            blocks += 1
    return found
