"""Where an export reads tensors: a checkpoint on disk, with or without a LoRA delta, or a live PyTorch model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cpmbee.config import ModelConfig
from cpmbee.errors import CheckpointError, ConfigError
from cpmbee.export.weights import require_finite
from cpmbee.model.checkpoint import open_checkpoint
from cpmbee.model.lora import LoraDelta, read_lora
from cpmbee.model.tensor_names import expected_tensors

if TYPE_CHECKING:
    from cpmbee.model import CpmBee

Array = NDArray[Any]


class TensorSource(Protocol):
    """Tensors by the research code's names, one at a time."""

    config: ModelConfig
    vocab_file: Path | None
    format: str

    def read(self, name: str) -> Array:
        """One tensor, in the dtype it is stored in (fp16, bfloat16 or fp32); fp32 where a delta was merged."""

    def originals(self, name: str) -> tuple[Array, ...]:
        """What `read` makes a tensor of; hashing these does not depend on how a machine multiplies matrices."""


class CheckpointSource:
    """A checkpoint on disk; every tensor is checked for NaN and infinities when it is read.

    Attributes:
        config: the model's.
        vocab_file: the vocabulary beside the weights, or None.
        format: of the weight files.
    """

    def __init__(self, path: str | Path, lora: LoraDelta | None = None) -> None:
        self._checkpoint = open_checkpoint(path)
        self._lora = lora
        self.config = self._checkpoint.config
        self.vocab_file = self._checkpoint.vocab_file
        self.format = self._checkpoint.files[0].suffix.removeprefix(".") + ("+lora" if lora is not None else "")
        if lora is not None:
            lora.check(self.config)

    def read(self, name: str) -> Array:
        """One tensor, merged with its delta in fp32 where it has one."""
        array = self._checkpoint.read(name)
        if self._lora is not None:
            array = self._lora.merge(name, array)
        require_finite(name, array)
        return array

    def originals(self, name: str) -> tuple[Array, ...]:
        """The tensor as stored, and what a delta adds to it."""
        return (self._checkpoint.read(name), *(() if self._lora is None else self._lora.parts(name)))


class LiveSource:
    """A PyTorch model in memory.

    Attributes:
        config: the model's.
        vocab_file: None; a model does not carry its vocabulary.
        format: ``torch.nn.Module``.
    """

    def __init__(self, model: CpmBee) -> None:
        self.config = model.config
        self.vocab_file: Path | None = None
        self.format = "torch.nn.Module"
        self._tensors = model.state_dict()
        expected = expected_tensors(self.config)
        shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        if shapes != expected:
            wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
            raise CheckpointError(f"the model's tensor {wrong[0]} does not fit its configuration")

    def read(self, name: str) -> Array:
        """One tensor as an array; bfloat16 comes widened to fp32, which loses nothing."""
        import torch

        tensor = self._tensors[name].detach().cpu()
        if tensor.dtype != torch.float16:
            tensor = tensor.float()
        array: Array = tensor.contiguous().numpy()
        require_finite(name, array)
        return array

    def originals(self, name: str) -> tuple[Array, ...]:
        """The tensor as `read` gives it."""
        return (self.read(name),)


class HashedSource:
    """Reads from another source and hashes everything on the way, so that an export reads its checkpoint once.

    The hash is over tensor names, dtypes, shapes and bytes, in name order: the same for one model in any file format
    and sharding.
    """

    def __init__(self, source: TensorSource) -> None:
        self.config = source.config
        self.vocab_file = source.vocab_file
        self.format = source.format
        self._source = source
        self._hashes: dict[str, str] = {}

    def read(self, name: str) -> Array:
        """One tensor of the source."""
        self._hash(name)
        return self._source.read(name)

    def originals(self, name: str) -> tuple[Array, ...]:
        """What the source makes a tensor of."""
        return self._source.originals(name)

    def hexdigest(self) -> str:
        """SHA-256 over all tensors; reads those that nobody has asked for."""
        names = sorted(expected_tensors(self._source.config))
        for name in names:
            self._hash(name)
        return hashlib.sha256("".join(self._hashes[name] for name in names).encode()).hexdigest()

    def _hash(self, name: str) -> None:
        if name in self._hashes:
            return
        digest = hashlib.sha256()
        for array in self._source.originals(name):
            digest.update(json.dumps([name, array.dtype.name, list(array.shape)]).encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        self._hashes[name] = digest.hexdigest()


def open_source(
    checkpoint: str | Path | CpmBee, lora: str | Path | LoraDelta | None = None, lora_alpha: float | None = None
) -> TensorSource:
    """The source for what the caller named.

    Raises:
        CheckpointError: the checkpoint or the delta cannot be read or do not fit together; or a delta was given for a
            live model.
        ConfigError: ``config.json`` is missing or wrong; or an alpha was given without a delta.
        DependencyError: the format needs a package that is not installed.
    """
    if lora is None and lora_alpha is not None:
        raise ConfigError("an alpha was given, but no LoRA delta that it could belong to")
    if isinstance(checkpoint, str | Path):
        delta = lora if lora is None or isinstance(lora, LoraDelta) else read_lora(lora, lora_alpha)
        return CheckpointSource(checkpoint, delta)
    if lora is not None:
        raise CheckpointError("a LoRA delta merges into a checkpoint; merge it into the live model instead")
    return LiveSource(checkpoint)
