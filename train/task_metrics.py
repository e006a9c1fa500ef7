"""Evaluation of a model that is being trained, on held-out records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cpmbee.engine import Engine
from cpmbee.model import CpmBee
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.evaluation import evaluate
from cpmbee.train.predictions import METRICS
from cpmbee.train.tasks import TaskRecord
from cpmbee.train.torch_backend import TorchBackend


class TaskMetrics:
    """Metrics of held-out records: an ``evaluate`` for `cpmbee.train.trainer.Trainer`.

    Args:
        records: with their right answers.
        tokenizer: the model's.
        metrics: of `METRICS`.
        cache_rows: tokens that all requests at a time may have.
    """

    def __init__(
        self,
        records: Sequence[TaskRecord],
        tokenizer: Tokenizer,
        metrics: Sequence[str] = METRICS,
        cache_rows: int = 8192,
    ) -> None:
        self.records = records
        self.tokenizer = tokenizer
        self.names = metrics
        self.cache_rows = cache_rows

    def __call__(self, model: CpmBee) -> Mapping[str, float]:
        """The metrics, and ``METRIC/TASK`` for each task, when there are several."""
        engine = Engine(TorchBackend(model, self.cache_rows), self.tokenizer)
        found = evaluate(engine, self.records, self.names)
        values = found.overall.metrics()
        for task, summary in found.tasks.items():
            values.update({f"{name}/{task}": value for name, value in summary.metrics().items()})
        return values
