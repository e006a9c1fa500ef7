"""Random models with the shape of real ones, exported for measurements: speed does not depend on what weights say."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from cpmbee.bench.environment import SHARED
from cpmbee.config import ModelConfig
from cpmbee.export.exporter import export
from cpmbee.model.tensor_names import expected_tensors

VOCABULARY_SIZE = 86_583  # of the published models
SPECIALS = ("<pad>", "<unk>", "<mask>", "<sep>", "</n>", "</_>", "<s>", "</s>", "<root>", "<ans>", "<option>")


def small_config(**changes: int) -> ModelConfig:
    """A model that is small but for its vocabulary, so that what surrounds the model shows."""
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "dim_head": 16,
        "dim_ff": 160,
        "num_hidden_layers": 4,
    }
    return ModelConfig(**{**values, **changes})


@contextmanager
def exported_random_model(config: ModelConfig, seed: int = 0) -> Iterator[Path]:
    """A model folder with random weights; it goes when the block ends."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        checkpoint.mkdir()
        tensors = {
            name: np.ones(shape, np.float32) if "layernorm" in name else rng.standard_normal(shape, np.float32)
            for name, shape in expected_tensors(config).items()
        }
        save_file(tensors, checkpoint / "model.safetensors")
        (checkpoint / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
        (checkpoint / "vocab.txt").write_text(_vocabulary(config.vocab_size), encoding="utf-8")
        export(checkpoint, Path(scratch) / "model", verify=False)
        yield Path(scratch) / "model"


def _vocabulary(size: int) -> str:
    """The published vocabulary where the development data lies and it fits, else one token per character."""
    published = SHARED / "data" / "bee_vocab.txt"
    if size == VOCABULARY_SIZE and published.exists():
        return published.read_text(encoding="utf-8")
    characters = (chr(code) for code in range(0x4E00, 0x4E00 + 2 * size) if not 0xD800 <= code < 0xE000)
    plain = [character for character, _ in zip(characters, range(size - len(SPECIALS)), strict=False)]
    return "\n".join((*SPECIALS, *plain)) + "\n"
