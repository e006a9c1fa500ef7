"""The PyTorch reference model of CPM-Bee, and reading and writing its checkpoints.

Names are imported on first use, so that reading a safetensors checkpoint works where torch is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cpmbee.errors import DependencyError

if TYPE_CHECKING:
    from cpmbee.model.checkpoint import Checkpoint, load_model, open_checkpoint, save_checkpoint
    from cpmbee.model.cpmbee import IGNORE_INDEX, CpmBee, ModelOutput, language_model_loss
    from cpmbee.model.lora import LoraDelta, read_lora

_HOME = {
    "IGNORE_INDEX": "cpmbee",
    "Checkpoint": "checkpoint",
    "CpmBee": "cpmbee",
    "LoraDelta": "lora",
    "ModelOutput": "cpmbee",
    "language_model_loss": "cpmbee",
    "load_model": "checkpoint",
    "open_checkpoint": "checkpoint",
    "read_lora": "lora",
    "save_checkpoint": "checkpoint",
}

__all__ = [
    "IGNORE_INDEX",
    "Checkpoint",
    "CpmBee",
    "LoraDelta",
    "ModelOutput",
    "language_model_loss",
    "load_model",
    "open_checkpoint",
    "read_lora",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise DependencyError(f'{__name__}.{name} needs torch: pip install "cpmbee[torch]"') from None
