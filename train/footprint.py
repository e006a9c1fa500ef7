"""How many parameters a run trains, and the memory that takes."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

_ADAMW_VALUES = 2  # averages of each trained parameter


@dataclass(frozen=True)
class Footprint:
    """Of one model; bytes are those of all processes together, activations not counted.

    Attributes:
        parameters: of the model, adapters included.
        trainable: those that change.
        weight_bytes: of all parameters.
        gradient_bytes: of the trainable ones.
        optimizer_bytes: of AdamW's averages of these.
    """

    parameters: int
    trainable: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> Footprint:
        """Count a model."""
        everything = list(model.parameters())
        trained = [parameter for parameter in everything if parameter.requires_grad]
        gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        return cls(
            parameters=sum(parameter.numel() for parameter in everything),
            trainable=sum(parameter.numel() for parameter in trained),
            weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in everything),
            gradient_bytes=gradients,
            optimizer_bytes=_ADAMW_VALUES * gradients,
        )

    def to_dict(self) -> dict[str, Any]:
        """For a report."""
        return asdict(self)

    def __str__(self) -> str:
        share = self.trainable / max(1, self.parameters)
        state = (self.gradient_bytes + self.optimizer_bytes) / 1e6
        return (
            f"{self.trainable:,} of {self.parameters:,} parameters are trained ({share:.2%}); weights "
            f"{self.weight_bytes / 1e6:,.1f} MB, gradients and optimizer {state:,.1f} MB"
        )


def peak_memory() -> dict[str, int]:
    """The most memory this process has had, in bytes: resident, and on the GPU where there is one."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    return peak
