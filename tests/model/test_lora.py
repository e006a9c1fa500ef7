"""LoRA deltas: both naming schemes, the formula against an unmerged computation, and wrong deltas."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cpmbee.errors import CheckpointError
from cpmbee.model import CpmBee, load_model, open_checkpoint, read_lora
from cpmbee.model.layers import Linear
from tests.golden import GOLDEN, requires_golden
from tests.model.factory import random_inputs, random_model, tiny_config, write_checkpoint

RANK, ALPHA = 2, 6.0
LAYERS = (
    "encoder.layers.0.self_att.self_attention.project_q",
    "encoder.layers.2.self_att.self_attention.attention_out",
    "encoder.layers.1.ffn.ffn.w_in.w_1",
    "encoder.layers.1.ffn.ffn.w_out",
)

State = dict[str, torch.Tensor]


def factors(seed: int = 3) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer -> A (r, d_in), B (d_out, r)."""
    generator = torch.Generator().manual_seed(seed)
    model = random_model()
    result = {}
    for layer in LAYERS:
        rows, columns = model.get_parameter(layer + ".weight").shape
        result[layer] = (
            torch.randn(RANK, columns, generator=generator),
            torch.randn(rows, RANK, generator=generator),
        )
    return result


def delta_state(scheme: str) -> State:
    before, after = {
        "opendelta": ("", ".lora.lora_{}"),
        "peft": ("base_model.model.cpmbee.", ".lora_{}.weight"),
    }[scheme]
    state = {}
    for layer, pair in factors().items():
        for factor, tensor in zip("AB", pair, strict=True):
            state[before + layer + after.format(factor)] = tensor
    return state


def write_delta(folder: Path, scheme: str, options: dict[str, Any] | None = None, state: State | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    state = delta_state(scheme) if state is None else state
    config = {"opendelta": "config.json", "peft": "adapter_config.json"}[scheme]
    if options is not None:
        (folder / config).write_text(json.dumps(options), encoding="utf-8")
    if scheme == "peft":
        save_file(state, folder / "adapter_model.safetensors")
        return folder
    torch.save(state, folder / "delta.pt")
    return folder / "delta.pt"


def unmerged_logits(model: CpmBee, scale: float) -> torch.Tensor:
    """Logits with the adapters computed beside the layers, as in training."""
    hooks = []
    for layer, (a, b) in factors().items():
        module = model.get_submodule(layer)
        assert isinstance(module, Linear)

        def add(_: Any, inputs: Any, output: Any, a: torch.Tensor = a, b: torch.Tensor = b) -> Any:
            return output + inputs[0] @ a.T @ b.T * scale

        hooks.append(module.register_forward_hook(add))
    logits = model(*random_inputs(model.config, 2, 7)).logits
    for hook in hooks:
        hook.remove()
    return logits


@torch.no_grad()
@pytest.mark.parametrize(
    ("scheme", "options", "alpha", "scale"),
    [
        ("opendelta", None, ALPHA, ALPHA / RANK),
        ("opendelta", {"lora_alpha": ALPHA, "lora_r": RANK}, None, ALPHA / RANK),
        ("opendelta", {"alpha": ALPHA}, None, ALPHA / RANK),
        ("peft", {"lora_alpha": ALPHA, "r": RANK}, ALPHA, ALPHA / RANK),
        ("peft", {"lora_alpha": ALPHA, "r": RANK, "use_dora": False}, None, ALPHA / RANK),
        ("peft", {"lora_alpha": ALPHA, "r": RANK, "use_rslora": True}, None, ALPHA / math.sqrt(RANK)),
    ],
)
def test_merged_equals_unmerged(
    tmp_path: Path, scheme: str, options: dict[str, Any] | None, alpha: float | None, scale: float
) -> None:
    base = write_checkpoint(tmp_path / "base")
    delta = write_delta(tmp_path / "delta", scheme, options)
    merged = load_model(base, lora=delta, lora_alpha=alpha)
    expected = unmerged_logits(random_model(), scale)
    logits = merged(*random_inputs(merged.config, 2, 7)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    again = load_model(base, lora=read_lora(delta, alpha))
    assert torch.equal(again(*random_inputs(merged.config, 2, 7)).logits, logits)


def test_merge_is_in_fp32_and_leaves_other_tensors_alone(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "base", random_model(dtype=torch.float16)))
    delta = read_lora(write_delta(tmp_path / "delta", "opendelta"), ALPHA)
    a, b = (factor.numpy().astype(np.float64) for factor in factors()[LAYERS[0]])
    weight = checkpoint.read(LAYERS[0] + ".weight")
    merged = delta.merge(LAYERS[0] + ".weight", weight)
    assert merged.dtype == np.float32
    by_hand = weight.astype(np.float64) + math.sqrt(weight.shape[1]) * ALPHA / RANK * (b @ a)
    np.testing.assert_allclose(merged, by_hand, rtol=1e-5, atol=1e-5)
    other = checkpoint.read("encoder.output_layernorm.weight")
    assert delta.merge("encoder.output_layernorm.weight", other) is other


def test_alpha_is_never_guessed(tmp_path: Path) -> None:
    path = write_delta(tmp_path / "delta", "opendelta", {"dim_model": 20})
    with pytest.raises(CheckpointError, match="lora_alpha"):
        read_lora(path)
    for wrong in (0, -1, float("nan"), "16", True):
        with pytest.raises(CheckpointError, match="alpha must be a positive number"):
            read_lora(path, wrong)  # type: ignore[arg-type]
    stated = write_delta(tmp_path / "stated", "peft", {"lora_alpha": 5, "r": RANK})
    with pytest.raises(CheckpointError, match="its configuration says alpha 5, not 16"):
        read_lora(stated, 16)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("encoder.layers.0.ffn.ffn.w_out.lora.lora_B", "w_out has no lora_A"),
        ("encoder.layers.0.ffn.ffn.w_out.lora.lora_A", "w_out has no lora_B"),
        ("encoder.layers.0.ffn.ffn.w_out.adapter.down", r"adapter\.down is not a LoRA factor"),
        ("base_model.model.encoder.layers.0.ffn.ffn.w_out.lora_magnitude_vector.weight", "is not a LoRA factor"),
        ("base_model.model.cpmbee." + LAYERS[0] + ".lora_A.weight", "is there twice"),
    ],
)
def test_keys_that_belong_to_no_delta(tmp_path: Path, key: str, message: str) -> None:
    state = {**delta_state("opendelta"), key: torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match=message):
        read_lora(write_delta(tmp_path / "delta", "opendelta", state=state), ALPHA)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        ("encoder.layers.7.ffn.ffn.w_out", (20, 28), r"no linear layer encoder\.layers\.7\.ffn\.ffn\.w_out$"),
        ("input_embedding", (20, 20), "no linear layer input_embedding"),
        (LAYERS[0], (24, 28), r"delta of .*project_q\.weight has shape \(24, 28\), expected \(24, 20\)"),
    ],
)
def test_delta_of_another_model(tmp_path: Path, layer: str, shape: tuple[int, int], message: str) -> None:
    base = write_checkpoint(tmp_path / "base")
    state = delta_state("opendelta")
    state[layer + ".lora.lora_A"] = torch.zeros(RANK, shape[1])
    state[layer + ".lora.lora_B"] = torch.zeros(shape[0], RANK)
    with pytest.raises(CheckpointError, match=message):
        load_model(base, lora=write_delta(tmp_path / "delta", "opendelta", state=state), lora_alpha=ALPHA)


def test_pruned_layers_take_no_delta(tmp_path: Path) -> None:
    pruned = random_model(tiny_config(mask_modules=((True, False), (False, False), (False, False))))
    base = write_checkpoint(tmp_path / "base", pruned)
    delta = write_delta(tmp_path / "delta", "opendelta")
    with pytest.raises(CheckpointError, match=r"no linear layer encoder\.layers\.0\S*project_q"):
        load_model(base, lora=delta, lora_alpha=ALPHA)


def test_configurations_that_cannot_be_merged(tmp_path: Path) -> None:
    for options, message in (
        ({"lora_alpha": 4, "use_dora": True}, "use_dora cannot be merged"),
        ({"lora_alpha": 4, "alpha_pattern": {"project_q": 8}}, "alpha_pattern cannot be merged"),
        ({"lora_alpha": 4, "r": 16}, "has rank 2, but the adapter's configuration says 16"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_lora(write_delta(tmp_path / "delta", "peft", options))
    (tmp_path / "delta" / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: not JSON"):
        read_lora(tmp_path / "delta")


def test_factors_of_different_ranks_and_empty_deltas(tmp_path: Path) -> None:
    state = delta_state("opendelta")
    state[LAYERS[0] + ".lora.lora_A"] = torch.zeros(3, 20)
    with pytest.raises(CheckpointError, match="project_q has factors of ranks 3 and 2"):
        read_lora(write_delta(tmp_path / "delta", "opendelta", state=state), ALPHA)
    with pytest.raises(CheckpointError, match="no LoRA factors"):
        read_lora(write_delta(tmp_path / "delta", "opendelta", state={}), ALPHA)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no LoRA delta here"):
        read_lora(tmp_path / "empty", ALPHA)
    with pytest.raises(CheckpointError, match="no such file"):
        read_lora(tmp_path / "absent.pt", ALPHA)


@requires_golden
def test_recorded_delta_touches_its_layers_only() -> None:
    plain = load_model(GOLDEN / "tiny").state_dict()
    adapted = load_model(GOLDEN / "tiny", lora=GOLDEN / "tiny" / "lora-delta.pt", lora_alpha=16).state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], adapted[name])}
    expected = {f"encoder.layers.{i}.self_att.self_attention.project_{p}.weight" for i in range(4) for p in ("q", "v")}
    assert changed == expected
