"""LoRA: only adapters learn; what is saved in either dialect, merged or exported computes what the adapters did."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cpmbee.cli import main
from cpmbee.engine import Engine
from cpmbee.errors import CheckpointError, ConfigError
from cpmbee.export import export
from cpmbee.model import CpmBee, load_model, open_checkpoint, read_lora
from cpmbee.model.lora import LoraDelta, LoraFactors
from cpmbee.model.lora_saving import save_lora
from cpmbee.model.merging import merge_checkpoint
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.batches import collate, encode_sample
from cpmbee.train.footprint import Footprint
from cpmbee.train.lora import ALL_LINEAR, LoraConfig, add_adapters, delta_of, load_adapters
from cpmbee.train.torch_backend import TorchBackend
from cpmbee.train.trainer import Trainer, TrainerConfig
from tests.golden import GOLDEN, requires_golden
from tests.model.factory import random_inputs, random_model, write_checkpoint
from tests.train.task_files import choice_records

CONFIG = LoraConfig(rank=2, alpha=6.0, targets=("project_q", "w_0", "layers.1.ffn.ffn.w_out"))
LAYERS = 3 + 3 + 1


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("lora") / "base")


@pytest.fixture(scope="module")
def trained(base: Path) -> CpmBee:
    """A model whose adapters have learned for some steps."""
    model = load_model(base)
    add_adapters(model, CONFIG)
    tokenizer = Tokenizer.from_file(base / "vocab.txt")
    samples = [encode_sample(record, tokenizer) for record in choice_records(8)]
    batch = collate([[sample] for sample in samples], tokenizer)
    result = Trainer(model, TrainerConfig(12, 0.05, warmup=2)).train([batch] * 12)
    assert result.losses[-1] < result.losses[0] - 0.5
    return model.eval()


def logits(model: CpmBee) -> torch.Tensor:
    with torch.inference_mode():
        return model(*random_inputs(model.config, 2, 7)).logits


def close(one: CpmBee, other: CpmBee) -> None:
    expected = logits(other)
    torch.testing.assert_close(logits(one), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_fresh_adapters_change_nothing(base: Path) -> None:
    model = load_model(base)
    before = logits(model)
    assert len(add_adapters(model, CONFIG)) == LAYERS
    assert torch.equal(logits(model), before)


def test_only_adapters_learn(base: Path, trained: CpmBee) -> None:
    plain = load_model(base).state_dict()
    state = trained.state_dict()
    assert all(torch.equal(state[name], plain[name]) for name in plain)
    learned = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    assert learned == set(state) - set(plain)
    assert all(name.endswith((".lora.lora_A", ".lora.lora_B")) for name in learned)
    assert not any(torch.equal(state[name], torch.zeros_like(state[name])) for name in learned)
    footprint = Footprint.of(trained)
    # three q (24 x 20), three w_0 (28 x 20), one w_out (20 x 28), rank 2
    assert footprint.trainable == 2 * (3 * (24 + 20) + 3 * (28 + 20) + 20 + 28)
    assert footprint.parameters == footprint.trainable + sum(p.numel() for p in load_model(base).parameters())
    assert footprint.optimizer_bytes == 2 * footprint.gradient_bytes == 8 * footprint.trainable
    assert f"{footprint.trainable:,} of {footprint.parameters:,} parameters are trained" in str(footprint)


@pytest.mark.parametrize("dialect", ["original", "peft"])
def test_saved_merged_and_read_again(base: Path, trained: CpmBee, dialect: str, tmp_path: Path) -> None:
    folder = tmp_path / "delta"
    save_lora(delta_of(trained), folder, dialect, base_model="base")  # type: ignore[arg-type]
    delta = read_lora(folder)
    assert set(delta.factors) == set(delta_of(trained).factors)
    merged = load_model(base, lora=delta)
    close(merged, trained)
    beside = load_model(base)
    load_adapters(beside, delta)
    assert torch.equal(logits(beside), logits(trained))
    merge_checkpoint(open_checkpoint(base), delta, tmp_path / "merged")
    assert all(
        torch.equal(tensor, merged.state_dict()[n])
        for n, tensor in load_model(tmp_path / "merged").state_dict().items()
    )
    with pytest.raises(CheckpointError, match="already exists"):
        save_lora(delta, folder, dialect)  # type: ignore[arg-type]
    save_lora(delta, folder, dialect, overwrite=True)  # type: ignore[arg-type]
    other = {"original": "peft", "peft": "original"}[dialect]
    with pytest.raises(CheckpointError, match=r"is not a (PEFT adapter|LoRA delta), so it is not overwritten"):
        save_lora(delta, folder, other, overwrite=True)  # type: ignore[arg-type]


def test_names_and_formula_of_peft(base: Path, trained: CpmBee, tmp_path: Path) -> None:
    """What PEFT computes beside Hugging Face's layer: base_layer(x) + lora_B(lora_A(x)) * lora_alpha / r."""
    save_lora(delta_of(trained), tmp_path / "adapter", "peft", base_model="base")
    options = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert (options["peft_type"], options["r"], options["lora_alpha"], options["bias"]) == ("LORA", 2, 6.0, "none")
    model = load_model(base)
    hooks = []
    for target in options["target_modules"]:
        prefix = f"base_model.model.{target}"
        a, b = tensors.pop(f"{prefix}.lora_A.weight"), tensors.pop(f"{prefix}.lora_B.weight")
        layer = model.get_submodule(target.removeprefix("cpmbee."))

        def add(_: object, inputs: tuple[torch.Tensor], output: torch.Tensor, a=a, b=b) -> torch.Tensor:  # type: ignore[no-untyped-def]
            return output + inputs[0] @ a.T @ b.T * (options["lora_alpha"] / options["r"])

        hooks.append(layer.register_forward_hook(add))
    assert not tensors
    assert len(hooks) == LAYERS
    close(model, trained)


def test_export_answers_as_the_adapters_do(base: Path, trained: CpmBee, tmp_path: Path) -> None:
    save_lora(delta_of(trained), tmp_path / "delta")
    export(base, tmp_path / "exported", lora=tmp_path / "delta", verify=False)
    exported = Engine.from_pretrained(tmp_path / "exported", num_threads=1)
    adapted = Engine(TorchBackend(trained, 1024), exported.tokenizer)
    plain = Engine(TorchBackend(load_model(base), 1024), exported.tokenizer)
    requests = choice_records(6, seed=1)
    for options in ({"beam_size": 1}, {"beam_size": 3}):
        ours, theirs, before = (e.generate(requests, max_new_tokens=8, **options) for e in (exported, adapted, plain))
        assert [r.answer for r in ours] == [r.answer for r in theirs]
        assert [r.answer for r in ours] != [r.answer for r in before]
        np.testing.assert_allclose([r.score for r in ours], [r.score for r in theirs], atol=1e-4)


def test_merge_command_keeps_the_dtype(tmp_path: Path, trained: CpmBee, capsys: pytest.CaptureFixture[str]) -> None:
    half = write_checkpoint(tmp_path / "half", random_model(dtype=torch.float16))
    save_lora(delta_of(trained), tmp_path / "delta")
    assert main(["merge", str(half), str(tmp_path / "delta"), str(tmp_path / "out")]) == 0
    assert f"merged the deltas of {LAYERS} matrices" in capsys.readouterr().out
    merged = open_checkpoint(tmp_path / "out")
    assert {merged.dtype(name).name for name in merged.names()} == {"float16"}
    assert merged.vocab_file is not None
    assert main(["merge", str(half), str(tmp_path / "delta"), str(tmp_path / "out")]) == 1
    assert "already exists" in capsys.readouterr().err
    wide = ["--overwrite", "--dtype", "float32", "--dialect", "original", "--format", "bin"]
    assert main(["merge", str(half), str(tmp_path / "delta"), str(tmp_path / "out"), *wide]) == 0
    close(load_model(tmp_path / "out"), load_model(half, lora=tmp_path / "delta"))


def test_merged_values_that_do_not_fit(base: Path, trained: CpmBee, tmp_path: Path) -> None:
    name, factors = next(iter(delta_of(trained).factors.items()))
    huge = LoraDelta(Path("huge"), {name: LoraFactors(factors.a * 1e6, factors.b, factors.scale)})
    with pytest.raises(CheckpointError, match=f"{name}: merged, .* not finite in torch.float16"):
        merge_checkpoint(open_checkpoint(base), huge, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_all_linear_layers(base: Path) -> None:
    model = load_model(base)
    assert len(add_adapters(model, LoraConfig(targets=(ALL_LINEAR,)))) == 3 * 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be an integer from 1 on"),
        ({"alpha": math.nan}, "alpha must be a positive number"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\)"),
        ({"targets": ()}, "no target"),
        ({"targets": ("query",)}, "no layer 'query'; there are attention_out, project_k"),
        ({"rank": 21}, "rank 21 is larger than"),
    ],
)
def test_wrong_adapters(base: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add_adapters(load_model(base), LoraConfig(**options))  # type: ignore[arg-type]


def test_layers_of_different_rank_cannot_be_saved(trained: CpmBee, tmp_path: Path) -> None:
    factors = dict(delta_of(trained).factors)
    name = next(iter(factors))
    factors[name] = LoraFactors(factors[name].a[:1], factors[name].b[:, :1], factors[name].scale)
    with pytest.raises(CheckpointError, match="differ in rank or scale"):
        save_lora(LoraDelta(Path("x"), factors), tmp_path / "delta")


@requires_golden
def test_names_of_the_recorded_delta(tmp_path: Path) -> None:
    recorded = torch.load(GOLDEN / "tiny" / "lora-delta.pt", weights_only=True)
    save_lora(read_lora(GOLDEN / "tiny" / "lora-delta.pt", 16), tmp_path / "delta")
    saved = torch.load(tmp_path / "delta" / "pytorch_model.bin", weights_only=True)
    assert {name: tensor.shape for name, tensor in saved.items()} == {n: t.shape for n, t in recorded.items()}
    assert all(torch.equal(saved[name], recorded[name].float()) for name in saved)
    assert json.loads((tmp_path / "delta" / "config.json").read_text(encoding="utf-8"))["lora_alpha"] == 16
