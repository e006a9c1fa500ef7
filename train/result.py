"""What a training run gives back."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingResult:
    """What a call of `Trainer.train` did.

    Attributes:
        losses: of every step of the call.
        tokens: seen since the run began, padding aside.
        seconds: wall time since the run began.
        steps: done since the run began.
        best_step: of the best evaluation, None without evaluations.
        best_value: what it gave.
        stopped_early: evaluations had stopped getting better.
    """

    losses: list[float]
    tokens: int
    seconds: float
    steps: int
    best_step: int | None = None
    best_value: float | None = None
    stopped_early: bool = False
