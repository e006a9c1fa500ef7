"""Opening a trained checkpoint of any dialect, format and number of files; torch is not needed.

A checkpoint that opens is complete: every tensor of its configuration is there, once, in the right shape, and nothing
else is. Only the embedding may have more rows than the vocabulary: some frameworks pad it to a round number.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpmbee.config import ModelConfig
from cpmbee.errors import CheckpointError
from cpmbee.json_file import read_json_object
from cpmbee.model.lora import LoraDelta, read_lora
from cpmbee.model.saving import save_checkpoint
from cpmbee.model.tensor_files import Array, TensorFile, needs_torch, numpy_dtype, open_tensor_file
from cpmbee.model.tensor_names import EMBEDDING, TIED_HEAD, canonical_name, expected_tensors, listed, wrapper_prefix
from cpmbee.staging import recover

if TYPE_CHECKING:
    import torch

    from cpmbee.model.cpmbee import CpmBee

logger = logging.getLogger("cpmbee.model")

__all__ = ["Checkpoint", "load_model", "open_checkpoint", "save_checkpoint"]

CONFIG_NAME = "config.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")
INDEX_SUFFIX = ".index.json"
_STANDARD_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_EXPORTED = ("engine.json", "model.onnx")  # what an exported folder has in the place of weights
_VOCABULARY_NAMES = ("vocab.txt", "vocabs/bee.txt", "bee.txt")
_MAX_TENSORS = 1 << 16
_NAME_BYTES = 255  # of a file, on any system
_ROWS = 4096  # of the tied head compared at a time


class Checkpoint:
    """An open checkpoint; tensors are named canonically and read one at a time.

    Attributes:
        path: what was opened.
        config: the model's configuration.
        vocab_file: the vocabulary found beside the weights, or None.
        files: the weight files.
    """

    def __init__(self, path: Path, config: ModelConfig, files: list[TensorFile], vocab_file: Path | None) -> None:
        self.path = path
        self.config = config
        self.vocab_file = vocab_file
        self.files = [file.path for file in files]
        self._home: dict[str, tuple[TensorFile, str]] = {}  # canonical name -> file, name in the file
        prefix = wrapper_prefix([name for file in files for name in file.names()])
        for file in files:
            for name in file.names():
                canonical = canonical_name(name.removeprefix(prefix))
                if canonical in self._home:
                    raise CheckpointError(f"{file.path}: {name} is there twice")
                self._home[canonical] = (file, name)
        head = self._home.pop(TIED_HEAD, None)
        self._check_shapes()
        if head is not None:
            self._check_tied(*head)

    def names(self) -> list[str]:
        """Canonical names of all tensors, in layer order."""
        return list(expected_tensors(self.config))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        file, stored = self._home[name]
        return self._without_padding(name, file.shape(stored))

    def dtype(self, name: str) -> np.dtype[Any]:
        """NumPy dtype of one tensor: float32, float16 or ``ml_dtypes.bfloat16``."""
        file, stored = self._home[name]
        return numpy_dtype(file.dtype(stored))

    def read(self, name: str) -> Array:
        """One tensor in the checkpoint's own dtype, usually a map of the file: do not keep more than needed."""
        file, stored = self._home[name]
        array = file.read(stored)
        return array[: self.config.vocab_size] if name == EMBEDDING else array

    def _without_padding(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape as the model has it, for the embedding's may have rows that belong to no token."""
        return (min(shape[0], self.config.vocab_size), *shape[1:]) if name == EMBEDDING and shape else shape

    def _check_shapes(self) -> None:
        expected = expected_tensors(self.config)
        problems = []
        for name, shape in expected.items():
            if name not in self._home:
                problems.append(f"missing {name}")
            elif self.shape(name) != shape:
                file, stored = self._home[name]
                problems.append(f"{name} has shape {file.shape(stored)}, expected {shape}")
        problems += [f"unexpected {self._home[name][1]}" for name in self._home if name not in expected]
        if problems:
            raise CheckpointError(f"{self.path}: does not fit its configuration: {listed(problems)}")
        file, stored = self._home[EMBEDDING]
        if padding := file.shape(stored)[0] - self.config.vocab_size:
            logger.warning("%s: left out the embedding's last %d rows, which belong to no token", self.path, padding)

    def _check_tied(self, file: TensorFile, stored: str) -> None:
        """The model has no output head of its own, so one that differs from the embedding cannot be honoured."""
        embedding = self.read(EMBEDDING)
        shape = self._without_padding(EMBEDDING, file.shape(stored))
        if shape == embedding.shape and numpy_dtype(file.dtype(stored)) == embedding.dtype:
            head = file.read(stored)[: len(embedding)]
            bits = f"u{head.dtype.itemsize}"
            if all(
                np.array_equal(head[i : i + _ROWS].view(bits), embedding[i : i + _ROWS].view(bits))
                for i in range(0, len(head), _ROWS)
            ):
                return
        raise CheckpointError(f"{file.path}: {stored} differs from {EMBEDDING}; CPM-Bee's output head is tied to it")


def open_checkpoint(path: str | Path, config: ModelConfig | None = None) -> Checkpoint:
    """Open a checkpoint folder, weight file or shard index.

    Args:
        path: a folder with ``config.json`` and weights, or one weight file (``.safetensors``, ``.bin``, ``.pt``) or
            ``*.index.json`` with ``config.json`` beside it.
        config: instead of ``config.json``.

    Raises:
        CheckpointError: nothing to open, a damaged file, or a missing, extra or misshapen tensor; names it.
        ConfigError: ``config.json`` is missing or wrong.
    """
    path = Path(path)
    try:
        recover(path)
        weights = _find_weights(path) if path.is_dir() else path
        missing = not weights.exists()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from None
    if missing:
        raise CheckpointError(f"{path}: no such file or folder")
    if weights.name in _EXPORTED:
        raise _exported(path)
    folder = weights.parent
    if config is None:
        config = ModelConfig.from_file(folder / CONFIG_NAME)
    shards = _read_index(weights) if weights.name.endswith(INDEX_SUFFIX) else None
    files = [open_tensor_file(weights)] if shards is None else _open_shards(weights, shards)
    vocab_file = next((folder / name for name in _VOCABULARY_NAMES if (folder / name).is_file()), None)
    return Checkpoint(path, config, files, vocab_file)


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    lora: str | Path | LoraDelta | None = None,
    lora_alpha: float | None = None,
    device: str | torch.device = "cpu",
) -> CpmBee:
    """Load a checkpoint into the reference model, in evaluation mode.

    Takes the memory of the model and of one tensor.

    Args:
        path: as in `open_checkpoint`.
        dtype: of the parameters; float32 unless given.
        lora: a LoRA delta to merge, or where to read it (`cpmbee.model.lora.read_lora`).
        lora_alpha: its alpha, where no configuration beside it says so.
        device: where the parameters go.

    Raises:
        CheckpointError: as in `open_checkpoint` and `cpmbee.model.lora.read_lora`.
        ConfigError: ``config.json`` is missing or wrong.
        DependencyError: torch is not installed.
    """
    try:
        from cpmbee.model.loading import model_from_checkpoint
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise needs_torch(f"{path}: loading it as a model") from None

    checkpoint = open_checkpoint(path)
    delta = lora if lora is None or isinstance(lora, LoraDelta) else read_lora(lora, lora_alpha)
    return model_from_checkpoint(checkpoint, dtype, delta, device)


def _find_weights(folder: Path) -> Path:
    for name in _STANDARD_NAMES:
        if (folder / name).is_file():
            return folder / name
    found = [file for file in sorted(folder.iterdir()) if file.name.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX))]
    if len(found) == 1:
        return found[0]
    if (folder / _EXPORTED[0]).is_file():
        raise _exported(folder)
    if found:
        names = listed([file.name for file in found])
        raise CheckpointError(f"{folder}: several weight files ({names}); name the one to open")
    raise CheckpointError(f"{folder}: no weights ({', '.join(_STANDARD_NAMES)} or one other weight file)")


def _exported(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: this is a model that cpmbee export wrote, not a checkpoint; name the checkpoint it was exported from"
    )


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard file name, every shard inside the index's folder."""
    weight_map = read_json_object(path, "the index of a sharded checkpoint", CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must be an object that names the shard of each tensor")
    if len(weight_map) > _MAX_TENSORS:
        raise CheckpointError(f"{path}: names {len(weight_map)} tensors; a checkpoint has at most {_MAX_TENSORS}")
    for name, shard in weight_map.items():
        # A plain file name: no separator of any system, no drive, not the folder itself.
        plain = isinstance(shard, str) and not set(shard) & set("/\\:\0") and shard not in ("", ".", "..")
        if not plain or not shard.endswith(WEIGHT_SUFFIXES) or len(shard.encode("utf-8", "replace")) > _NAME_BYTES:
            raise CheckpointError(
                f"{path}: shard {str(shard)[:80]!r} of {name} is not a weight file's name in this folder"
            )
    return weight_map


def _open_shards(index: Path, shards: dict[str, str]) -> list[TensorFile]:
    files = {shard: open_tensor_file(index.parent / shard) for shard in sorted(set(shards.values()))}
    stored = {(shard, name) for shard, file in files.items() for name in file.names()}
    announced = {(shard, name) for name, shard in shards.items()}
    problems = [f"{name} is not in {shard}" for shard, name in sorted(announced - stored)]
    problems += [f"{shard} holds {name}, which the index does not name" for shard, name in sorted(stored - announced)]
    if problems:
        raise CheckpointError(f"{index}: {listed(problems)}")
    return list(files.values())
