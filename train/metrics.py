"""The record of a run: one JSON line a step in ``metrics.jsonl``, and TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from cpmbee.errors import CheckpointError
from cpmbee.staging import staged_file
from cpmbee.train.event_file import EventFile

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
    """Appends to a run's record; what an earlier, killed process wrote behind the resumed step is removed.

    Every step and evaluation is handed to the operating system when it is recorded, so that a run that is killed has
    lost none.

    Raises:
        CheckpointError: a file cannot be written; names it.
    """

    def __init__(self, folder: Path, resumed_step: int, tensorboard: bool) -> None:
        self._path, self._events = folder / FILE_NAME, folder / "tensorboard"
        with _naming(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = _cut(self._path, resumed_step).open("a", encoding="utf-8")
        self._event_file: EventFile | None = None
        if tensorboard:
            with _naming(self._events):
                self._event_file = EventFile(self._events, resumed_step + 1)

    def step(self, metrics: StepMetrics) -> None:
        """Record a step."""
        values = {
            f"train/{name}": getattr(metrics, name)
            for name in ("loss", "learning_rate", "tokens_per_second", "padding", "gradient_norm")
        }
        values |= {f"tasks/{task}": loss for task, loss in metrics.task_losses.items()}
        self._record(metrics.step, asdict(metrics), values)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Record an evaluation after a step."""
        scalars = {f"evaluation/{name}": value for name, value in values.items()}
        self._record(step, {"step": step, "evaluation": dict(values)}, scalars)

    def close(self) -> None:
        """Nothing can be recorded any more."""
        with suppress(OSError):  # what was recorded is written; what could not be was said
            self._file.close()
        if self._event_file is not None:
            with suppress(OSError):
                self._event_file.close()

    def _record(self, step: int, line: dict[str, Any], scalars: Mapping[str, float]) -> None:
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in line.items()}
        with _naming(self._path):
            self._file.write(json.dumps(finite, ensure_ascii=False) + "\n")
            self._file.flush()
        if self._event_file is not None:
            with _naming(self._events):
                self._event_file.add(step, scalars)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say in errors of the operating system which file is at fault."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error})") from error


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
