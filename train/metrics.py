"""The record of a run: one JSON line a step in ``metrics.jsonl``, and TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cpmbee.staging import staged_file

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

FILE_NAME = "metrics.jsonl"


@dataclass(frozen=True)
class StepMetrics:
    """What one step did, over all processes.

    Attributes:
        step: counted from 1.
        loss: mean cross entropy of the step's target tokens, before the step.
        task_losses: the same per task that had targets.
        learning_rate: that the step used.
        tokens: trained on since the run began, padding aside.
        tokens_per_second: of this step, waiting for its data included.
        padding: share of the positions that were padding.
        gradient_norm: before clipping; infinite where fp16 overflowed and the step was skipped.
        seconds: of training since the run began, evaluations and checkpoints included.
    """

    step: int
    loss: float
    task_losses: dict[str, float]
    learning_rate: float
    tokens: int
    tokens_per_second: float
    padding: float
    gradient_norm: float
    seconds: float


class MetricsLog:
    """Appends to a run's record; what an earlier, killed process wrote behind the resumed step is removed."""

    def __init__(self, folder: Path, resumed_step: int, tensorboard: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = _cut(folder / FILE_NAME, resumed_step).open("a", encoding="utf-8")
        self._writer: SummaryWriter | None = None
        if tensorboard:
            from torch.utils.tensorboard.writer import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def step(self, metrics: StepMetrics) -> None:
        """Record a step."""
        self._write(asdict(metrics))
        if self._writer is not None:
            for name in ("loss", "learning_rate", "tokens_per_second", "padding", "gradient_norm"):
                self._writer.add_scalar(f"train/{name}", getattr(metrics, name), metrics.step)
            for task, loss in metrics.task_losses.items():
                self._writer.add_scalar(f"tasks/{task}", loss, metrics.step)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Record an evaluation after a step."""
        self._write({"step": step, "evaluation": dict(values)})
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"evaluation/{name}", value, step)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Nothing can be recorded any more."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _write(self, line: dict[str, Any]) -> None:
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
        self._file.write(json.dumps(finite, ensure_ascii=False) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's record; one that a killed process left half-written ends it."""
    lines = []
    for line in (folder / FILE_NAME).read_text(encoding="utf-8").split("\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _cut(file: Path, step: int) -> Path:
    """Keep the lines up to a step."""
    if file.exists():
        kept = [line for line in read_metrics(file.parent) if line["step"] <= step]
        with staged_file(file) as cut:
            cut.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
    return file
