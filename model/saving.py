"""Writing the reference model as a checkpoint that this project, the research code or Hugging Face's code reads."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cpmbee.config import ModelConfig
from cpmbee.errors import CheckpointError
from cpmbee.model.tensor_names import EMBEDDING, HUGGINGFACE_PREFIX, expected_tensors
from cpmbee.model.tensor_writing import write_tensors
from cpmbee.outputs import FolderKind, require_replaceable
from cpmbee.staging import staged_folder

if TYPE_CHECKING:
    import torch

    from cpmbee.model.cpmbee import CpmBee

Dialect = Literal["huggingface", "original"]
FileFormat = Literal["safetensors", "bin"]

_STEM = {"safetensors": "model", "bin": "pytorch_model"}
_WEIGHTS = "|".join(
    rf"{stem}(-\d{{5,}}-of-\d{{5,}})?\.{suffix}|{stem}\.{suffix}\.index\.json" for suffix, stem in _STEM.items()
)
CHECKPOINT = FolderKind(
    "a checkpoint",
    re.compile(rf"config\.json|vocab\.txt|{_WEIGHTS}"),
    lambda folder: ModelConfig.from_file(folder / "config.json"),
)


def save_checkpoint(
    model: CpmBee,
    folder: str | Path,
    dialect: Dialect = "huggingface",
    file_format: FileFormat = "safetensors",
    max_shard_bytes: int = 5 << 30,
    vocab_file: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint folder, bit for bit what the model's parameters hold, in their own dtype.

    The files are written to a temporary folder beside ``folder``, which then takes its place: an interrupted save
    leaves nothing half-written there.

    Args:
        model: its parameters may be on any device.
        folder: created; its parents too.
        dialect: names of tensors and configuration fields.
        file_format: ``safetensors``, or ``bin`` for ``torch.save``.
        max_shard_bytes: a file holds no more, except that a tensor is never split.
        vocab_file: copied to ``vocab.txt`` in the folder.
        overwrite: replace an existing checkpoint; a folder that holds anything else is never replaced.

    Raises:
        CheckpointError: the folder exists or cannot be written, or an unknown option.
        DependencyError: safetensors is not installed.
    """
    parameters = dict(model.named_parameters())
    dtypes = {name: parameters[name].dtype for name in expected_tensors(model.config)}
    save_tensors(
        model.config,
        dtypes,
        lambda name: parameters[name].detach(),
        folder,
        dialect,
        file_format,
        max_shard_bytes,
        vocab_file,
        overwrite,
    )


def save_tensors(
    config: ModelConfig,
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[str], torch.Tensor],
    folder: str | Path,
    dialect: Dialect = "huggingface",
    file_format: FileFormat = "safetensors",
    max_shard_bytes: int = 5 << 30,
    vocab_file: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint folder of tensors that are made one after the other; takes the memory of one file.

    Args:
        config: the model's.
        dtypes: of every tensor, by its canonical name.
        read: gives one of them, on any device.
        folder: as in `save_checkpoint`, like all that follow.
        dialect: likewise.
        file_format: likewise.
        max_shard_bytes: likewise.
        vocab_file: likewise.
        overwrite: likewise.

    Raises:
        CheckpointError: the folder exists or cannot be written, or an unknown option.
        DependencyError: safetensors is not installed.
    """
    folder = Path(folder).absolute()
    if dialect not in ("huggingface", "original") or file_format not in _STEM or max_shard_bytes <= 0:
        raise CheckpointError(
            f"{folder}: cannot save as {dialect!r}, {file_format!r}, {max_shard_bytes} bytes a file; dialects are "
            "huggingface and original, formats safetensors and bin"
        )

    def replaceable(target: Path) -> None:
        require_replaceable(target, CHECKPOINT, overwrite, CheckpointError)

    with staged_folder(folder, CheckpointError, replaceable) as partial:
        _write_weights(config, dtypes, read, partial, dialect, file_format, max_shard_bytes)
        _write_config(config, dtypes[EMBEDDING], partial, dialect)
        if vocab_file is not None:
            shutil.copyfile(vocab_file, partial / "vocab.txt")
        mode = (partial / "config.json").stat().st_mode  # safetensors writes files that only their owner may read
        for file in partial.iterdir():
            file.chmod(mode)


def _write_weights(
    config: ModelConfig,
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[str], torch.Tensor],
    folder: Path,
    dialect: Dialect,
    file_format: FileFormat,
    max_bytes: int,
) -> None:
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in expected_tensors(config).items()}
    shards = _split(sizes, max_bytes)
    prefix = HUGGINGFACE_PREFIX if dialect == "huggingface" else ""
    stem, suffix = _STEM[file_format], file_format
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        number = "" if len(shards) == 1 else f"-{i:05d}-of-{len(shards):05d}"
        file = f"{stem}{number}.{suffix}"
        _write_shard({prefix + name: read(name) for name in names}, folder / file)
        weight_map.update(dict.fromkeys((prefix + name for name in names), file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(folder / f"{stem}.{suffix}.index.json", index)


def _split(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Names in order, in groups that hold at most ``max_bytes`` or one tensor."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _write_shard(given: dict[str, torch.Tensor], file: Path) -> None:
    # A copy on the CPU that owns exactly its elements: torch.save would write the whole storage behind a view.
    write_tensors({name: tensor.cpu().clone().contiguous() for name, tensor in given.items()}, file)


def _write_config(config: ModelConfig, dtype: torch.dtype, folder: Path, dialect: Dialect) -> None:
    values = config.to_dict(dialect)
    if dialect == "huggingface":
        values["torch_dtype"] = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", values)


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
