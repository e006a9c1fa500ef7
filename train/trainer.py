"""The training loop: AdamW with warm-up and cosine decay over batches that somebody else makes."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpmbee.model import IGNORE_INDEX, CpmBee, language_model_loss
from cpmbee.relation import RelationBuilder
from cpmbee.train.batches import Int32Array, TrainingBatch

logger = logging.getLogger("cpmbee.train")


@dataclass(frozen=True)
class TrainerConfig:
    """How to train.

    Attributes:
        steps: optimizer steps.
        learning_rate: its peak.
        warmup: steps of linear warm-up before the cosine decay to zero.
        weight_decay: of all matrices; norms and the bias table are not decayed.
        betas: AdamW's averages.
        max_grad_norm: gradients are clipped to this norm.
        log_every: steps between progress lines.
    """

    steps: int
    learning_rate: float = 1e-2
    warmup: int = 100
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0
    log_every: int = 200


@dataclass(frozen=True)
class TrainingResult:
    """What a run did.

    Attributes:
        losses: of every step.
        tokens: tokens seen, padding aside.
        seconds: wall time.
    """

    losses: list[float]
    tokens: int
    seconds: float


class Trainer:
    """Trains one model; its state is the optimizer's and the number of steps done."""

    def __init__(self, model: CpmBee, config: TrainerConfig) -> None:
        self.model = model
        self.config = config
        self.relations = RelationBuilder(model.config)
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=config.betas, eps=1e-8
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._learning_rate_factor)

    def train(self, batches: Iterable[TrainingBatch]) -> TrainingResult:
        """Take one step per batch until the configured number of steps is done.

        Raises:
            ValueError: there are fewer batches than steps.
            FloatingPointError: the loss is no longer finite.
        """
        self.model.train()
        started = time.perf_counter()
        losses: list[float] = []
        tokens = 0
        for batch in islice(batches, self.config.steps):
            losses.append(self.step(batch))
            tokens += int(batch.length.sum())
            if len(losses) % self.config.log_every == 0 or len(losses) == self.config.steps:
                recent = losses[-self.config.log_every :]
                seconds = time.perf_counter() - started
                logger.info(
                    "step %d of %d: loss %.4f, %.0f tokens/s, %.0f s",
                    len(losses), self.config.steps, sum(recent) / len(recent), tokens / seconds, seconds,
                )  # fmt: skip
        if len(losses) < self.config.steps:
            raise ValueError(f"the data ended after {len(losses)} of {self.config.steps} steps")
        self.model.eval()
        return TrainingResult(losses, tokens, time.perf_counter() - started)

    def step(self, batch: TrainingBatch) -> float:
        """One optimizer step; returns the loss before it.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = batch_loss(self.model, batch, self.relations)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss became {value}; lower the learning rate")
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        return value

    def _learning_rate_factor(self, step: int) -> float:
        if step < self.config.warmup:
            return (step + 1) / self.config.warmup
        done = (step - self.config.warmup) / max(1, self.config.steps - self.config.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def batch_loss(model: CpmBee, batch: TrainingBatch, relations: RelationBuilder) -> Tensor:
    """Mean cross entropy over the targets of a batch; a scalar with a gradient.

    Logits are computed where there are targets and nowhere else.
    """
    where, targets = target_positions(batch.targets)
    output = model(
        torch.from_numpy(batch.input_ids),
        torch.from_numpy(batch.input_subs),
        torch.from_numpy(batch.relation(relations)),
        ext_ids=torch.from_numpy(batch.ext_ids),
        ext_subs=torch.from_numpy(batch.ext_subs),
        logits_index=torch.from_numpy(where),
    )
    return language_model_loss(output.logits, torch.from_numpy(targets))


def target_positions(targets: Int32Array) -> tuple[NDArray[np.int64], Int32Array]:
    """Where a batch has targets, row by row, and what they are.

    Args:
        targets: int32[B, T], `IGNORE_INDEX` where nothing is predicted.

    Returns:
        int64[B, R] positions, and int32[B, R] their targets; R is the most that one row has, and rows with fewer
        name positions without a target behind theirs.
    """
    counted = targets != IGNORE_INDEX
    most = int(counted.sum(1).max(initial=0))
    where = np.argsort(~counted, axis=1, kind="stable")[:, :most]
    return where, np.take_along_axis(targets, where, axis=1)


def _parameter_groups(model: CpmBee, weight_decay: float) -> list[dict[str, object]]:
    """Matrices with weight decay; norms and the position bias without."""
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (free if parameter.dim() < 2 or name.startswith("position_bias") else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
