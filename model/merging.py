"""A checkpoint with a LoRA delta merged in, as a new checkpoint; tensor by tensor, so that any size fits."""

from __future__ import annotations

from pathlib import Path

import torch

from cpmbee.errors import CheckpointError
from cpmbee.model.checkpoint import Checkpoint
from cpmbee.model.loading import tensor_from_array
from cpmbee.model.lora import LoraDelta
from cpmbee.model.saving import Dialect, FileFormat, save_tensors
from cpmbee.outputs import require_apart


def merge_checkpoint(
    checkpoint: Checkpoint,
    delta: LoraDelta,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    dialect: Dialect = "huggingface",
    file_format: FileFormat = "safetensors",
    max_shard_bytes: int = 5 << 30,
    overwrite: bool = False,
) -> int:
    """Write ``W + sqrt(d_in) * alpha / r * B A`` for every layer of the delta, and everything else as it is.

    The sum is made in fp32 and rounded once. The vocabulary beside the checkpoint is copied.

    Args:
        checkpoint: of the base model.
        delta: what to add.
        folder: created.
        dtype: of all tensors; None keeps what each has.
        dialect: as in `cpmbee.model.saving.save_checkpoint`, like all that follow.
        file_format: likewise.
        max_shard_bytes: likewise.
        overwrite: likewise.

    Returns:
        How many tensors were changed.

    Raises:
        CheckpointError: the delta does not fit the model, a sum is too large for the dtype, or the folder exists or
            holds what is merged.
    """
    folder = Path(folder)
    require_apart([folder], [checkpoint.path, *checkpoint.files, delta.path], CheckpointError)
    delta.check(checkpoint.config)
    dtypes = {name: dtype or getattr(torch, checkpoint.dtype(name).name) for name in checkpoint.names()}

    def read(name: str) -> torch.Tensor:
        merged = tensor_from_array(delta.merge(name, checkpoint.read(name))).to(dtypes[name])
        if not bool(merged.isfinite().all()):
            raise CheckpointError(f"{name}: merged, it has values that are not finite in {dtypes[name]}")
        return merged

    save_tensors(
        checkpoint.config, dtypes, read, folder, dialect, file_format, max_shard_bytes, checkpoint.vocab_file, overwrite
    )
    return len(delta.factors) + len(delta.replaced)
