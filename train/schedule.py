"""Learning-rate schedules, and how a rate follows the size of the batch; functions of the step only."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "noam", "constant"]
BatchScaling = Literal["sqrt", "linear"]


def learning_rate_factor(schedule: Schedule, step: int, warmup: int, steps: int) -> float:
    """What the peak rate is multiplied by at a step.

    All schedules start with a linear warm-up. ``noam`` then falls with the inverse square root of the step ("Attention
    is all you need", section 5.3; the research code's ``start_lr`` is the peak times sqrt(warmup)), ``cosine`` falls to
    zero at the last step, ``constant`` stays.

    Args:
        schedule: its name.
        step: counted from 0.
        warmup: steps of warm-up.
        steps: of the whole run.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "noam":
        return math.sqrt(max(1, warmup) / (step + 1))
    if schedule == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return 1.0


def batch_factor(scaling: BatchScaling, rows: int, reference_rows: int) -> float:
    """What a rate tuned for batches of ``reference_rows`` is multiplied by for batches of ``rows``.

    ``sqrt`` keeps the noise of Adam's steps the same (Malladi et al. 2022, "On the SDEs and scaling rules for adaptive
    gradient algorithms"); ``linear`` is the rule for plain SGD, often used for Adam as well.
    """
    ratio = rows / reference_rows
    return math.sqrt(ratio) if scaling == "sqrt" else ratio
