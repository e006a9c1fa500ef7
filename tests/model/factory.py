"""Small random models and checkpoints, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cpmbee.config import ModelConfig
from cpmbee.model import CpmBee, save_checkpoint

SPECIAL_TOKENS = ["<unk>", "<mask>", "<ans>", "<root>", "<s>", "</s>", "<pad>", "<option>", "</n>", "</_>"]
PLAIN_TOKENS = [
    *"abcdefghijklmnopqrstuvwxyz,.今天气真好北京上学",
    "input",
    "prompt",
    "question",
    "options",
    "今天",
    "天气",
]
VOCABULARY = [*SPECIAL_TOKENS, *PLAIN_TOKENS]


def tiny_config(**overrides: Any) -> ModelConfig:
    """A configuration that fits `VOCABULARY`; all of its sizes differ, so that a mix-up shows."""
    values: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 20,
        "num_attention_heads": 3,
        "dim_head": 8,
        "dim_ff": 28,
        "num_hidden_layers": 3,
        "position_bias_num_buckets": 32,
        "position_bias_num_segment_buckets": 64,
        "position_bias_max_distance": 128,
    }
    return ModelConfig(**{**values, **overrides})


def random_model(config: ModelConfig | None = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> CpmBee:
    """A random model in evaluation mode; its norms are random too."""
    model = CpmBee(config or tiny_config())
    generator = torch.Generator().manual_seed(seed)
    model.init_parameters(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model.to(dtype).eval()


def write_vocabulary(file: Path) -> Path:
    file.write_text("".join(f"{token}\n" for token in VOCABULARY), encoding="utf-8")
    return file


def write_checkpoint(folder: Path, model: CpmBee | None = None, **options: Any) -> Path:
    """A checkpoint folder with a vocabulary; ``options`` are those of `save_checkpoint`."""
    save_checkpoint(model or random_model(), folder, **options)
    write_vocabulary(folder / "vocab.txt")
    return folder


def random_inputs(
    config: ModelConfig, batch: int, tokens: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, subscripts and a causal relation matrix with random buckets: (B, T), (B, T), int16 (B, T, T)."""
    rng = np.random.default_rng(seed)
    relation = rng.integers(0, config.num_bias_rows, (batch, tokens, tokens), np.int16)
    relation[:, ~np.tri(tokens, dtype=np.bool_)] = -1
    return (
        torch.from_numpy(rng.integers(0, config.vocab_size, (batch, tokens))),
        torch.from_numpy(rng.integers(0, 4, (batch, tokens))),
        torch.from_numpy(relation),
    )


def tensors_of(model: CpmBee) -> dict[str, npt.NDArray[Any]]:
    """Canonical name -> float32 array of every parameter."""
    return {name: parameter.detach().float().numpy() for name, parameter in model.named_parameters()}
