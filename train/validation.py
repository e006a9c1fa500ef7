"""Evaluation during training: the loss of held-out batches, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cpmbee.errors import ConfigError
from cpmbee.model import CpmBee
from cpmbee.relation import RelationBuilder
from cpmbee.train.batches import TrainingBatch
from cpmbee.train.loss import count_targets, task_losses
from cpmbee.train.processes import Processes
from cpmbee.train.source import rows_of_rank


class HeldOutLoss:
    """Mean loss of batches that are never trained on: an ``evaluate`` for `cpmbee.train.trainer.Trainer`.

    Processes share the rows of every batch.
    """

    def __init__(self, batches: Sequence[TrainingBatch], tasks: Sequence[str] = ("all",)) -> None:
        processes = Processes.current()
        if not batches:
            raise ConfigError("there are no held-out batches to evaluate on")
        self.batches = [rows_of_rank(batch, processes.rank, processes.world_size) for batch in batches]
        self.tasks = tuple(tasks)

    def __call__(self, model: CpmBee) -> dict[str, float]:
        """``loss``, and ``loss/TASK`` for every task that has targets, when there are several."""
        device = model.input_embedding.weight.device
        relations = RelationBuilder(model.config)
        total = np.zeros((2, len(self.tasks)))
        for batch in self.batches:
            losses = task_losses(model, batch, relations, len(self.tasks), device)
            total += np.stack((losses.double().cpu().numpy(), count_targets(batch, len(self.tasks))))
        losses, counts = Processes.current().sum(total, device)
        result = {"loss": float(losses.sum() / max(1, counts.sum()))}
        if len(self.tasks) > 1:
            shown = zip(self.tasks, losses, counts, strict=True)
            result.update({f"loss/{task}": float(loss / count) for task, loss, count in shown if count})
        return result


@dataclass
class Best:
    """The best evaluation so far.

    Attributes:
        step: after which it was measured; None before the first.
        value: what it gave.
        waited: evaluations since then.
    """

    step: int | None = None
    value: float | None = None
    waited: int = 0

    def update(self, step: int, values: Mapping[str, float], monitor: str, higher_is_better: bool) -> bool:
        """Take note of an evaluation; returns whether it is the best.

        Raises:
            ConfigError: the evaluation did not give the value that decides.
        """
        if monitor not in values:
            raise ConfigError(f"the evaluation gave {', '.join(values)}, not {monitor!r}, which decides what is best")
        value = values[monitor]
        improved = self.value is None or (value > self.value if higher_is_better else value < self.value)
        if improved and math.isfinite(value):
            self.step, self.value, self.waited = step, value, 0
            return True
        self.waited += 1
        return False
