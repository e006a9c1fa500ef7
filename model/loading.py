"""A checkpoint's tensors into the reference model, one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from cpmbee.model.cpmbee import CpmBee
from cpmbee.model.lora import LoraDelta
from cpmbee.model.tensor_files import Array

if TYPE_CHECKING:
    from cpmbee.model.checkpoint import Checkpoint


def model_from_checkpoint(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    lora: LoraDelta | None = None,
    device: str | torch.device = "cpu",
) -> CpmBee:
    """The model of a checkpoint, in evaluation mode; float32 unless ``dtype`` says otherwise.

    Takes the memory of the model and of one tensor.

    Raises:
        CheckpointError: the delta does not fit the model, or a tensor cannot be read.
    """
    if lora is not None:
        lora.check(checkpoint.config)
    with torch.device("meta"):  # shapes only; every parameter is replaced below
        model = CpmBee(checkpoint.config)
    state = {}
    for name in checkpoint.names():
        array = checkpoint.read(name)
        if lora is not None:
            array = lora.merge(name, array)
        # Always a copy: a parameter that maps the file would change with it.
        state[name] = tensor_from_array(array).to(device, dtype or torch.float32, copy=True)
    model.load_state_dict(state, assign=True)
    return model.eval()


def tensor_from_array(array: Array) -> torch.Tensor:
    """A tensor that shares the array's memory; bfloat16 is unknown to torch's NumPy bridge and goes as bits."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
