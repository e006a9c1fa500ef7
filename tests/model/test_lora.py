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
        ({"use_dora": True}, "project_q has no magnitude"),
        ({"alpha_pattern": {"(a+)+$": 8}}, "alpha_pattern must give values to names"),
        ({"alpha_pattern": {"project_q": -8}}, "alpha must be a positive number"),
        ({"rank_pattern": {"project_q": 8}}, "has rank 2, but the adapter's configuration says 8"),
        ({"r": 16}, "has rank 2, but the adapter's configuration says 16"),
        ({"r": 2.5}, "a rank must be an integer"),
        ({"peft_type": "LOHA"}, "an adapter of type 'LOHA'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias cannot be merged"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out cannot be merged"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication cannot be merged"),
        ({"use_qalora": True}, "use_qalora cannot be merged"),
        ({"alora_invocation_tokens": [7]}, "alora_invocation_tokens cannot be merged"),
        ({"trainable_token_indices": [7]}, "trainable_token_indices cannot be merged"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config cannot be merged"),
        ({"use_rslora": 3}, "use_rslora must be true or false"),
        ({"something_new": {"a": 1}}, "something_new cannot be merged"),
        *(
            ({"init_lora_weights": start}, f"init_lora_weights is '{start}'.* path_initial_model")
            for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "whatever")
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_lora(write_delta(tmp_path / "delta", "peft", {"lora_alpha": 4, **options}))
    opendelta = write_delta(tmp_path / "opendelta", "opendelta", {"delta_type": "adapter", "lora_alpha": 4})
    with pytest.raises(CheckpointError, match="a delta of type 'adapter'"):
        read_lora(opendelta)
    (tmp_path / "delta" / "adapter_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: not JSON"):
        read_lora(tmp_path / "delta")


def test_options_that_change_nothing_are_fine(tmp_path: Path) -> None:
    plain = read_lora(write_delta(tmp_path / "plain", "peft", {"lora_alpha": ALPHA, "r": RANK}))
    options = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somewhere",
        "target_modules": ["project_q"],
        "init_lora_weights": "gaussian",
        "bias": "none",
        "layer_replication": None,
        "loftq_config": {},
        "something_new": False,
    }
    full = read_lora(write_delta(tmp_path / "full", "peft", {"lora_alpha": ALPHA, "r": RANK, **options}))
    assert full.plain
    for name, pair in plain.factors.items():
        assert (full.factors[name].scale, full.replaced) == (pair.scale, {})


def test_alphas_and_ranks_of_single_layers(tmp_path: Path) -> None:
    patterns = {
        "alpha_pattern": {"layers.0.self_att.self_attention.project_q": 10, "^cpmbee." + LAYERS[3]: 14, "w_1x": 1},
        "rank_pattern": {"w_out": RANK, "w_1": RANK},
    }
    options = {"lora_alpha": ALPHA, "r": 5, "rank_pattern": {name.rpartition(".")[2]: RANK for name in LAYERS}}
    delta = read_lora(write_delta(tmp_path / "delta", "peft", {**options, "alpha_pattern": patterns["alpha_pattern"]}))
    scales = {name.removesuffix(".weight"): factors.scale for name, factors in delta.factors.items()}
    assert scales == {LAYERS[0]: 10 / RANK, LAYERS[1]: ALPHA / RANK, LAYERS[2]: ALPHA / RANK, LAYERS[3]: 14 / RANK}
    rooted = read_lora(write_delta(tmp_path / "rooted", "peft", {**options, **patterns, "r": RANK, "use_rslora": True}))
    assert rooted.factors[LAYERS[0] + ".weight"].scale == 10 / math.sqrt(RANK)


def test_converted_adapters_are_plain_ones(tmp_path: Path) -> None:
    """PEFT writes ``[A, A0]`` and ``[B, -B0]`` with twice the rank and alpha: their product is what training added."""
    base = write_checkpoint(tmp_path / "base")
    generator = torch.Generator().manual_seed(8)
    state, scale = {}, ALPHA / RANK
    start = {
        layer: (torch.randn(a.shape, generator=generator), torch.randn(b.shape, generator=generator))
        for layer, (a, b) in factors().items()
    }
    for layer, (a, b) in factors().items():
        a0, b0 = start[layer]
        state[f"base_model.model.cpmbee.{layer}.lora_A.weight"] = torch.cat([a, a0])
        state[f"base_model.model.cpmbee.{layer}.lora_B.weight"] = torch.cat([b, -b0], 1)
    options = {"lora_alpha": 2 * ALPHA, "r": 2 * RANK, "init_lora_weights": True}
    delta = read_lora(write_delta(tmp_path / "delta", "peft", options, state))
    checkpoint = open_checkpoint(base)
    for layer, (a, b) in factors().items():
        weight = checkpoint.read(layer + ".weight").astype(np.float64)
        a0, b0 = (factor.double().numpy() for factor in start[layer])
        expected = weight + math.sqrt(weight.shape[1]) * scale * (b.double().numpy() @ a.double().numpy() - b0 @ a0)
        np.testing.assert_allclose(delta.merge(layer + ".weight", weight), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_dora_equals_the_unmerged_computation(tmp_path: Path) -> None:
    base, scale = write_checkpoint(tmp_path / "base"), ALPHA / RANK
    state, magnitudes = delta_state("peft"), {}
    for i, layer in enumerate(factors()):
        magnitudes[layer] = torch.rand(factors()[layer][1].shape[0], generator=torch.Generator().manual_seed(i)) + 0.5
        state[f"base_model.model.cpmbee.{layer}.lora_magnitude_vector" + ".weight" * (i % 2)] = magnitudes[layer]
    options = {"lora_alpha": ALPHA, "r": RANK, "use_dora": True}
    folder = write_delta(tmp_path / "delta", "peft", options, state)
    merged = load_model(base, lora=folder)

    model, hooks = random_model(), []
    for layer, (a, b) in factors().items():
        module = model.get_submodule(layer)
        assert isinstance(module, Linear)
        ratio = magnitudes[layer] / torch.linalg.norm(module.weight + scale * b @ a, dim=1)

        def add(_: Any, inputs: Any, output: Any, a: Any = a, b: Any = b, ratio: Any = ratio) -> Any:
            return ratio * (output + inputs[0] @ a.T @ b.T * scale)

        hooks.append(module.register_forward_hook(add))
    inputs = random_inputs(model.config, 2, 7)
    expected = model(*inputs).logits
    torch.testing.assert_close(merged(*inputs).logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    del state[f"base_model.model.cpmbee.{LAYERS[0]}.lora_magnitude_vector"]
    with pytest.raises(CheckpointError, match="project_q has no magnitude"):
        read_lora(write_delta(tmp_path / "half", "peft", options, state))
    with pytest.raises(CheckpointError, match="has a magnitude, against the configuration"):
        read_lora(write_delta(tmp_path / "silent", "peft", {**options, "use_dora": False}, state))


def test_modules_that_were_trained_whole(tmp_path: Path) -> None:
    norm, table = "encoder.output_layernorm.weight", "position_bias.relative_attention_bias"
    model = random_model()
    new = {norm: torch.rand(model.get_parameter(norm).shape), table: torch.rand(model.get_parameter(table).shape)}
    state = {**delta_state("peft"), **{"base_model.model.cpmbee." + name: tensor for name, tensor in new.items()}}
    options = {"lora_alpha": ALPHA, "r": RANK, "modules_to_save": ["output_layernorm", "position_bias"]}
    base = write_checkpoint(tmp_path / "base")
    folder = write_delta(tmp_path / "delta", "peft", options, state)
    delta = read_lora(folder)
    assert not delta.plain
    merged, plain = load_model(base, lora=folder).state_dict(), load_model(base).state_dict()
    for name, tensor in new.items():
        assert torch.equal(merged[name], tensor)
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert changed == {*new, *(layer + ".weight" for layer in LAYERS)}
    with pytest.raises(CheckpointError, match=r"output_layernorm\.weight is not a LoRA factor"):
        read_lora(write_delta(tmp_path / "silent", "peft", {**options, "modules_to_save": ["position_bias"]}, state))
    missing = {**options, "modules_to_save": ["output_layernorm", "position_bias", "lm_head"]}
    folder = write_delta(tmp_path / "missing", "peft", missing, state)
    with pytest.raises(CheckpointError, match="lm_head is to be saved, but nothing of it is here"):
        read_lora(folder)
    state["base_model.model.cpmbee." + norm] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"output_layernorm.weight has shape \(3,\), expected"):
        load_model(base, lora=write_delta(tmp_path / "wrong", "peft", options, state))
    from cpmbee.model.lora_saving import save_lora

    with pytest.raises(CheckpointError, match="only plain LoRA can be saved"):
        save_lora(delta, tmp_path / "saved")


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
