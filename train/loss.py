"""The training loss: cross entropy of the answer tokens, summed per task."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor, nn

from cpmbee.model import IGNORE_INDEX
from cpmbee.relation import RelationBuilder
from cpmbee.train.batches import TrainingBatch


def count_targets(batch: TrainingBatch, num_tasks: int) -> NDArray[np.int64]:
    """Target tokens of each task, int64[num_tasks].

    Raises:
        ValueError: a target belongs to a task that the source did not name.
    """
    tasks = batch.task_ids[batch.targets != IGNORE_INDEX]
    if len(tasks) and not 0 <= tasks.min() <= tasks.max() < num_tasks:
        raise ValueError(f"a batch has task ids {tasks.min()} to {tasks.max()}, its source {num_tasks} tasks")
    return np.bincount(tasks, minlength=num_tasks)


def task_losses(
    model: nn.Module, batch: TrainingBatch, relations: RelationBuilder, num_tasks: int, device: torch.device
) -> Tensor:
    """Cross entropy in fp32 (or wider), summed over the target tokens of each task: (num_tasks,) with a gradient.

    Logits are computed only where there is a target.
    """
    rows, positions = np.nonzero(batch.targets != IGNORE_INDEX)
    counts = np.bincount(rows, minlength=len(batch.targets))
    # (B, R), R the most targets that a row has, at least one; the others point at position 0, which is then ignored
    index = np.zeros((len(counts), max(1, int(counts.max()))), np.int64)
    targets = np.full(index.shape, IGNORE_INDEX, np.int64)
    tasks = np.zeros(index.shape, np.int64)
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    index[rows, columns] = positions
    targets[rows, columns] = batch.targets[rows, positions]
    tasks[rows, columns] = batch.task_ids[rows, positions]

    def on_device(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    extended = len(batch.ext_ids) > 0
    logits: Tensor = model(
        on_device(batch.input_ids),
        on_device(batch.input_subs),
        on_device(batch.relation(relations)),
        ext_ids=on_device(batch.ext_ids) if extended else None,
        ext_subs=on_device(batch.ext_subs) if extended else None,
        logits_index=on_device(index),
        use_cache=False,
    ).logits
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    losses = F.cross_entropy(wide, on_device(targets).flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.new_zeros(num_tasks).index_add(0, on_device(tasks).flatten(), losses)
