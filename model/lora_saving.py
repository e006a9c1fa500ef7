"""Writing LoRA deltas in the research code's names (OpenDelta) or in PEFT's; `cpmbee.model.lora` reads both.

Both train the same formula on this model: the adapter adds ``alpha / r * B A x`` to the output of its layer, which is
``W x / sqrt(d_in)`` in the research code and in Hugging Face's ``CpmBeeLinear`` alike. So the factors are the same
numbers in both dialects. Merging is where they part: the merged matrix is ``W + sqrt(d_in) * alpha / r * B A``
(`cpmbee.model.lora.merged_weight`), which ``cpmbee merge`` writes. PEFT's own ``merge_and_unload`` knows nothing of the
layer's scale, adds ``alpha / r * B A`` and is wrong for this model; unmerged, PEFT runs the adapter right.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cpmbee.errors import CheckpointError
from cpmbee.json_file import read_json_object
from cpmbee.model.lora import LoraDelta
from cpmbee.model.tensor_files import Array
from cpmbee.model.tensor_names import HUGGINGFACE_PREFIX
from cpmbee.model.tensor_writing import write_arrays
from cpmbee.outputs import FolderKind, require_replaceable
from cpmbee.staging import staged_folder

DeltaDialect = Literal["original", "peft"]
_FILES = {
    "original": ("pytorch_model.bin", "config.json"),
    "peft": ("adapter_model.safetensors", "adapter_config.json"),
}


def _require_type(file: Path, field: str, value: str) -> None:
    """Refuse a configuration that is not one of ours.

    Raises:
        CheckpointError: it cannot be read, or says something else.
    """
    if read_json_object(file, "the configuration of a delta", CheckpointError).get(field) != value:
        raise CheckpointError(f"{file}: {field} is not {value}")


DELTAS = {
    "original": FolderKind(
        "a LoRA delta",
        re.compile(r"pytorch_model\.bin|config\.json"),
        lambda folder: _require_type(folder / "config.json", "delta_type", "lora"),
    ),
    "peft": FolderKind(
        "a PEFT adapter",
        re.compile(r"adapter_model\.safetensors|adapter_config\.json"),
        lambda folder: _require_type(folder / "adapter_config.json", "peft_type", "LORA"),
    ),
}


def save_lora(
    delta: LoraDelta,
    folder: str | Path,
    dialect: DeltaDialect = "original",
    *,
    base_model: str | None = None,
    dropout: float = 0.0,
    overwrite: bool = False,
) -> None:
    """Write a delta to a folder, all or nothing, in fp32.

    Args:
        delta: all of its layers have one rank and one scale.
        folder: created; its parents too.
        dialect: ``original`` writes ``pytorch_model.bin`` with the research code's names (what
            ``torch.load(file, weights_only=True)`` gives can be loaded there) and OpenDelta's ``config.json``;
            ``peft`` writes ``adapter_model.safetensors`` with Hugging Face's module names and ``adapter_config.json``.
        base_model: name or path of the model it was trained on, for PEFT's ``base_model_name_or_path``.
        dropout: that it was trained with; recorded.
        overwrite: replace a delta of the same dialect that is there.

    Raises:
        CheckpointError: the folder exists, cannot be written, or the layers differ in rank or scale.
        DependencyError: torch (``original``) or safetensors (``peft``) is not installed.
    """
    folder = Path(folder)
    if dialect not in _FILES:
        raise CheckpointError(f"{folder}: no dialect {dialect!r} of deltas; there are {', '.join(_FILES)}")
    weights, config = _FILES[dialect]
    if not delta.plain:
        raise CheckpointError(f"{folder}: only plain LoRA can be saved; merge a delta with DoRA or whole modules")
    kinds = {(factors.a.shape[0], factors.scale) for factors in delta.factors.values()}
    if len(kinds) != 1:
        raise CheckpointError(f"{folder}: a delta whose layers differ in rank or scale cannot be saved")
    ((rank, scale),) = kinds
    alpha = scale * rank
    tensors: dict[str, Array] = {}
    for name, factors in delta.factors.items():
        layer = name.removesuffix(".weight")
        for letter, factor in (("A", factors.a), ("B", factors.b)):
            key = _key(layer, letter, dialect)
            tensors[key] = np.ascontiguousarray(factor, np.float32)
    options = {"original": _opendelta_options, "peft": _peft_options}[dialect]
    values = options(rank, alpha, dropout, _modules(delta), base_model)

    def replaceable(target: Path) -> None:
        require_replaceable(target, DELTAS[dialect], overwrite, CheckpointError)

    with staged_folder(folder, CheckpointError, replaceable) as partial:
        write_arrays(tensors, partial / weights)
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (partial / config).write_text(text, encoding="utf-8")
        (partial / weights).chmod((partial / config).stat().st_mode)  # safetensors lets only the owner read


def _key(layer: str, letter: str, dialect: DeltaDialect) -> str:
    if dialect == "peft":
        return f"base_model.model.{HUGGINGFACE_PREFIX}{layer}.lora_{letter}.weight"
    return f"{layer}.lora.lora_{letter}"


def _modules(delta: LoraDelta) -> list[str]:
    """The layers' paths: short names such as ``project_q`` would stand for that layer of every block."""
    return sorted(name.removesuffix(".weight") for name in delta.factors)


def _opendelta_options(
    rank: int, alpha: float, dropout: float, modules: list[str], base_model: str | None
) -> dict[str, Any]:
    return {
        "delta_type": "lora",
        "lora_r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modified_modules": modules,
        "backbone_checkpoint_name": base_model,
    }


def _peft_options(
    rank: int, alpha: float, dropout: float, modules: list[str], base_model: str | None
) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": [HUGGINGFACE_PREFIX + module for module in modules],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
