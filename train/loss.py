"""The training loss: cross entropy of the answer tokens, summed per task."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn

from cpmbee.errors import DataError
from cpmbee.model import IGNORE_INDEX
from cpmbee.relation import RelationBuilder
from cpmbee.train.batches import Int32Array, TrainingBatch


def count_targets(batch: TrainingBatch, num_tasks: int) -> NDArray[np.int64]:
    """Target tokens of each task, int64[num_tasks].

    Raises:
        DataError: a target belongs to a task that the source did not name.
    """
    tasks = batch.task_ids[batch.targets != IGNORE_INDEX]
    if len(tasks) and not 0 <= tasks.min() <= tasks.max() < num_tasks:
        raise DataError(f"a batch has task ids {tasks.min()} to {tasks.max()}, its source {num_tasks} tasks")
    return np.bincount(tasks, minlength=num_tasks)


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


def task_losses(
    model: nn.Module, batch: TrainingBatch, relations: RelationBuilder, num_tasks: int, device: torch.device
) -> Tensor:
    """Cross entropy in fp32 (or wider), summed over the target tokens of each task: (num_tasks,) with a gradient.

    Logits are computed where there are targets and nowhere else.
    """
    where, targets = target_positions(batch.targets)
    tasks = np.take_along_axis(batch.task_ids, where, axis=1).clip(min=0)  # whatever fills up has no loss

    def on_device(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    logits: Tensor = model(
        on_device(batch.input_ids),
        on_device(batch.input_subs),
        on_device(batch.relation(relations)),
        ext_ids=on_device(batch.ext_ids),
        ext_subs=on_device(batch.ext_subs),
        logits_index=on_device(where),
        use_cache=False,
    ).logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    losses = F.cross_entropy(wide, on_device(targets).flatten().long(), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.new_zeros(num_tasks).index_add(0, on_device(tasks).flatten(), losses)
