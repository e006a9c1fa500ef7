"""One optimizer step on a global batch: forward, backward, clipping, AdamW, in the precision asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from cpmbee.errors import ConfigError
from cpmbee.model import CpmBee
from cpmbee.relation import RelationBuilder
from cpmbee.train.batches import TrainingBatch
from cpmbee.train.loss import count_targets, task_losses
from cpmbee.train.processes import Processes

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepResult:
    """Sums over all processes and micro-batches of a step.

    Attributes:
        losses: float64[tasks] summed cross entropy.
        targets: float64[tasks] target tokens.
        tokens: padding aside.
        positions: padding included.
        rows: of the global batch.
        gradient_norm: before clipping; not finite where fp16 overflowed and the parameters were left alone.
    """

    losses: NDArray[np.float64]
    targets: NDArray[np.float64]
    tokens: int
    positions: int
    rows: int
    gradient_norm: float

    @property
    def loss(self) -> float:
        """Mean over all target tokens."""
        return float(self.losses.sum() / max(1.0, self.targets.sum()))


class OptimizerStep:
    """Takes steps; its state is the optimizer's and the loss scaler's.

    The loss is normalized by the targets of the whole global batch, so that neither accumulation nor the number of
    processes changes a gradient.
    """

    def __init__(
        self,
        model: CpmBee,
        processes: Processes,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_grad_norm: float,
        precision: Precision,
    ) -> None:
        self.model = model
        self.processes = processes
        self.device = model.input_embedding.weight.device
        self.max_grad_norm = max_grad_norm
        self.precision = precision
        self.relations = RelationBuilder(model.config)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.trained:
            raise ConfigError("the model has no parameter to train: all are frozen")
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(model, weight_decay), lr=0.0, betas=betas, eps=eps, fused=True
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def autocast(self) -> AbstractContextManager[object]:
        """The context that forward passes run in."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, AUTOCAST[self.precision])

    def __call__(self, batches: Sequence[TrainingBatch], num_tasks: int, learning_rate: float) -> StepResult:
        """Train on this process's share of a global batch.

        Args:
            batches: micro-batches, equally many on every process.
            num_tasks: of the source.
            learning_rate: of this step.

        Raises:
            FloatingPointError: the loss is not finite, or (fp16 aside) the gradient; the parameters are as before.
        """
        targets = np.sum([count_targets(batch, num_tasks) for batch in batches], 0)
        sizes = [(batch.length.sum(), batch.input_ids.size, len(batch.input_ids)) for batch in batches]
        counts = self.processes.sum(np.concatenate((targets, np.sum(sizes, 0))), self.device)
        targets, (tokens, positions, rows) = counts[:num_tasks], counts[num_tasks:].astype(int).tolist()
        losses = self._backward(batches, num_tasks, max(1.0, float(targets.sum())))
        self.scaler.unscale_(self.optimizer)
        norm = _whole(clip_grad_norm_(self.trained, self.max_grad_norm))
        # The only place where the host waits for the device.
        *summed, gradient_norm = torch.cat((losses.double(), norm.double().reshape(1))).tolist()
        result = StepResult(
            self.processes.sum(np.asarray(summed), self.device), targets, tokens, positions, rows, gradient_norm
        )
        if not math.isfinite(result.loss):
            raise FloatingPointError(f"the loss became {result.loss}; lower the learning rate")
        if not math.isfinite(gradient_norm) and not self.scaler.is_enabled():
            raise FloatingPointError(f"the gradient's norm became {gradient_norm}; lower the learning rate")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return result

    def _backward(self, batches: Sequence[TrainingBatch], num_tasks: int, num_targets: float) -> Tensor:
        """Gradients of all micro-batches; returns their summed losses per task, (num_tasks,)."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros(num_tasks, device=self.device)
        for number, batch in enumerate(batches, start=1):
            if self.processes.world_size > 1:  # gradients meet once a step
                self.model.set_requires_gradient_sync(number == len(batches))  # type: ignore[operator]
            with self.autocast():
                losses = task_losses(self.model, batch, self.relations, num_tasks, self.device)
            # FSDP averages gradients over the processes; what is wanted is their sum.
            loss = losses.sum() * (self.processes.world_size / num_targets)
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += losses.detach()
        return total


def _whole(norm: Tensor) -> Tensor:
    """The value of a norm whose parts may lie on several processes."""
    full: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return full


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices with weight decay; norms and the position bias without; frozen parameters in neither."""
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if parameter.dim() < 2 or name.startswith("position_bias") else decayed).append(parameter)
    groups = ((decayed, weight_decay), (free, 0.0))
    return [{"params": parameters, "weight_decay": decay} for parameters, decay in groups if parameters]
