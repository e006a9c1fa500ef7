"""What a model makes of records, and metrics over that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cpmbee.choices import Choice
from cpmbee.results import Answer
from cpmbee.scoring import ChoiceScore

METRICS = ("loss", "choice_accuracy", "exact_match")


@dataclass(frozen=True)
class Prediction:
    """What the model makes of one record; fields of metrics that were not asked for are None.

    Attributes:
        where: the record was read.
        task: it belongs to.
        expected: the right answer.
        answer: what the model writes by greedy search; None where it did not get to begin.
        exact: whether that is the right answer to the last character, ended by the model.
        logprob: of the right answer; None where the model cannot write it, because it has an unknown or special token
            that is not in the request.
        tokens: of the right answer, every ``</s>`` included.
        scores: of the choices, in order.
        choice: the likeliest of them.
        right: whether that is the right one.
    """

    where: str
    task: str
    expected: Choice
    answer: Answer = None
    exact: bool | None = None
    logprob: float | None = None
    tokens: int = 0
    scores: tuple[ChoiceScore, ...] = ()
    choice: Choice | None = None
    right: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """What is known, ready for JSON."""
        values = {name: value for name, value in asdict(self).items() if value is not None and value != ()}
        if self.logprob is None:
            values.pop("tokens", None)
        return values


@dataclass
class Summary:
    """Metrics over some predictions.

    Attributes:
        records: how many there are.
        scored: those whose right answer has a probability.
        tokens: of these answers, every ``</s>`` included.
        loss: mean negative log-probability of these tokens.
        exact_match: share of answers that are exactly right.
        choice_records: those with choices.
        choice_accuracy: share of these whose likeliest choice is right.
    """

    records: int = 0
    scored: int = 0
    tokens: int = 0
    loss: float | None = None
    exact_match: float | None = None
    choice_records: int = 0
    choice_accuracy: float | None = None

    @property
    def perplexity(self) -> float | None:
        """Exponential of the loss."""
        return None if self.loss is None else math.exp(min(self.loss, 700.0))

    def to_dict(self) -> dict[str, Any]:
        """The metrics that there are, for a report."""
        values = {**asdict(self), "perplexity": self.perplexity}
        return {name: value for name, value in values.items() if value is not None}

    def metrics(self) -> dict[str, float]:
        """The metrics that there are, by the names of `METRICS`."""
        return {name: value for name in METRICS if (value := getattr(self, name)) is not None}


@dataclass
class Evaluation:
    """Everything about a set of records.

    Attributes:
        overall: metrics of all of them.
        tasks: metrics of each task, when there are several.
        predictions: one for each record, in order.
    """

    overall: Summary
    tasks: dict[str, Summary] = field(default_factory=dict)
    predictions: list[Prediction] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Metrics of all records, and of each task, for a report."""
        tasks = {task: summary.to_dict() for task, summary in self.tasks.items()}
        return {**self.overall.to_dict(), **({"tasks": tasks} if tasks else {})}


def summarize(predictions: Sequence[Prediction]) -> Evaluation:
    """Metrics of predictions."""
    tasks = dict.fromkeys(prediction.task for prediction in predictions)
    parts = {task: _summary([p for p in predictions if p.task == task]) for task in tasks} if len(tasks) > 1 else {}
    return Evaluation(_summary(predictions), parts, list(predictions))


def _summary(predictions: Sequence[Prediction]) -> Summary:
    scored = [p for p in predictions if p.logprob is not None]
    tokens = sum(p.tokens for p in scored)
    chosen = [p.right for p in predictions if p.right is not None]
    written = [p.exact for p in predictions if p.exact is not None]
    return Summary(
        records=len(predictions),
        scored=len(scored),
        tokens=tokens,
        loss=-math.fsum(p.logprob for p in scored if p.logprob is not None) / tokens if tokens else None,
        exact_match=sum(written) / len(written) if written else None,
        choice_records=len(chosen),
        choice_accuracy=sum(chosen) / len(chosen) if chosen else None,
    )
