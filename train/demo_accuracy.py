"""How many held-out requests the demo model answers rightly, task by task, without decoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cpmbee.model import IGNORE_INDEX, CpmBee
from cpmbee.relation import RelationBuilder
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.batches import TrainingBatch, TrainingSample, collate, encode_sample


@dataclass(frozen=True)
class Accuracy:
    """Exact matches among held-out requests."""

    right: int
    total: int

    @property
    def share(self) -> float:
        """Of requests that are right, 0 to 1."""
        return self.right / self.total

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} % ({self.right} of {self.total})"


class HeldOutAccuracy:
    """Measures exact match of free greedy decoding; an ``evaluate`` for `cpmbee.train.trainer.Trainer`.

    Greedy decoding writes the right answer if and only if the right token, the end included, is the best one at every
    position behind the right tokens before it. So one forward pass over the solved request tells what decoding step by
    step would.
    """

    def __init__(
        self, held_out: Mapping[str, Sequence[dict[str, Any]]], tokenizer: Tokenizer, rows_per_batch: int = 100
    ) -> None:
        """``held_out`` has the solved requests of every task."""
        self._batches: dict[str, list[TrainingBatch]] = {}
        for task, requests in held_out.items():
            samples: list[TrainingSample] = sorted((encode_sample(data, tokenizer) for data in requests), key=len)
            starts = range(0, len(samples), rows_per_batch)
            self._batches[task] = [
                collate([[sample] for sample in samples[start : start + rows_per_batch]], tokenizer) for start in starts
            ]

    def __call__(self, model: CpmBee) -> dict[str, float]:
        """``accuracy``, the mean of the tasks, and ``accuracy/TASK`` of each."""
        shares = {task: accuracy.share for task, accuracy in self.measure(model).items()}
        return {
            "accuracy": sum(shares.values()) / len(shares),
            **{f"accuracy/{task}": share for task, share in shares.items()},
        }

    def measure(self, model: CpmBee) -> dict[str, Accuracy]:
        """Accuracy of every task."""
        relations = RelationBuilder(model.config)
        found: dict[str, Accuracy] = {}
        for task, batches in self._batches.items():
            right = sum(int(right_rows(model, batch, relations).sum()) for batch in batches)
            found[task] = Accuracy(right, sum(len(batch.input_ids) for batch in batches))
        return found


@torch.no_grad()
def right_rows(model: CpmBee, batch: TrainingBatch, relations: RelationBuilder) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Whether the model's best token is the right one at every target of a row: bool[B]."""
    counted = batch.targets != IGNORE_INDEX
    where = np.argsort(~counted, axis=1, kind="stable")[:, : int(counted.sum(1).max())]  # of targets, then of others
    targets = np.take_along_axis(batch.targets, where, axis=1)
    logits = model(
        torch.from_numpy(batch.input_ids),
        torch.from_numpy(batch.input_subs),
        torch.from_numpy(batch.relation(relations)),
        ext_ids=torch.from_numpy(batch.ext_ids),
        ext_subs=torch.from_numpy(batch.ext_subs),
        logits_index=torch.from_numpy(where),
    ).logits
    best = logits.argmax(-1).numpy()
    right: np.ndarray[Any, np.dtype[np.bool_]] = ((best == targets) | (targets == IGNORE_INDEX)).all(1)
    return right
