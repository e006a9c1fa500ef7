"""Models of every shape that an export has to handle, and short ways to compare them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpmbee.config import ModelConfig
from cpmbee.export.comparison import Call, record
from cpmbee.export.exporter import export
from cpmbee.export.probes import Probe, make_probes, make_requests
from cpmbee.export.reference_loading import ReferenceModel, load_reference
from cpmbee.export.sources import open_source
from cpmbee.export.weights import Precision
from cpmbee.tokenizer import Tokenizer
from tests.model.factory import random_model, tiny_config, write_checkpoint

CACHE_ROWS = 1024
CONFIGS = {
    "full": tiny_config(),
    "pruned": tiny_config(
        num_hidden_layers=5, mask_modules=((False, False), (True, False), (False, True), (True, True), (False, False))
    ),
    "last attention pruned": tiny_config(mask_modules=((False, False), (False, True), (True, False))),
    "no attention": tiny_config(mask_modules=((True, False),) * 3),
    "no feed-forward": tiny_config(mask_modules=((False, True),) * 3),
    "nothing left": tiny_config(mask_modules=((True, True),) * 3),
    "half": tiny_config(half=True, distance_scale=8),
    "odd scale, large eps": tiny_config(distance_scale=3.3, eps=0.1),
}


def make_checkpoint(folder: Path, config: ModelConfig | None = None) -> Path:
    return write_checkpoint(folder, random_model(config), file_format="safetensors")


def make_folder(
    tmp_path: Path, config: ModelConfig | None = None, precision: Precision = "fp32", **options: Any
) -> tuple[Path, Path]:
    """A checkpoint and its unverified export."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", config)
    out = tmp_path / "exported"
    export(checkpoint, out, precision, verify=False, **options)
    return checkpoint, out


def probes_for(folder: Path, steps: int = 3) -> list[Probe]:
    tokenizer = Tokenizer.from_file(folder / "vocab.txt")
    return make_probes(make_requests(tokenizer), tokenizer, ModelConfig.from_file(folder / "config.json"), steps)


def reference_calls(checkpoint: Path, precision: Precision = "fp32", steps: int = 3) -> list[Call]:
    """What the reference computes on the probes."""
    model = load_reference(open_source(checkpoint), precision)
    return record(ReferenceModel(model, CACHE_ROWS), probes_for(checkpoint, steps), steps)
