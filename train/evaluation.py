"""How good answers are: exact match, right choices, and the loss of the right answers.

The model is behind `cpmbee.engine.Engine`: an exported folder (torch is not needed then), or a PyTorch model through
`cpmbee.train.torch_backend.TorchBackend`. Everything else is the same for both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from cpmbee.choices import Choice, ChoiceEncoder
from cpmbee.engine import Engine
from cpmbee.errors import CacheFullError, CpmBeeError, DataError, PromptError, TokenizeError
from cpmbee.results import GenerationResult
from cpmbee.scoring import ChoiceScore
from cpmbee.token_space import make_token_space
from cpmbee.train.data.records import Record
from cpmbee.train.predictions import METRICS, Evaluation, Prediction, summarize
from cpmbee.train.tasks import TaskRecord

BATCH_RECORDS = 64
GREEDY: dict[str, Any] = {"beam_size": 1, "repetition_penalty": 1.0, "temperature": None, "top_k": None, "top_p": None}


def evaluate(
    engine: Engine,
    records: Iterable[TaskRecord],
    metrics: Sequence[str] = METRICS,
    max_new_tokens: int | None = None,
    examples: Sequence[Record] = (),
) -> Evaluation:
    """Measure an engine on records; see `predict`."""
    predictions = list(predict(engine, records, metrics, max_new_tokens, examples))
    return summarize(predictions)


def predict(
    engine: Engine,
    records: Iterable[TaskRecord],
    metrics: Sequence[str] = METRICS,
    max_new_tokens: int | None = None,
    examples: Sequence[Record] = (),
) -> Iterator[Prediction]:
    """Ask an engine about records, some at a time.

    Args:
        engine: the model.
        records: with their right answers.
        metrics: of `METRICS`; ``loss`` and ``choice_accuracy`` score given answers, ``exact_match`` writes one.
        max_new_tokens: budget of an answer; None gives what the longest right answer among those that are written
            together takes, and one more: whatever is longer cannot be right.
        examples: in-context examples for every record: requests with their right answers.

    Raises:
        DataError: a record cannot be read by this model; names it and the path in it.
    """
    waiting = iter(records)
    while batch := list(islice(waiting, BATCH_RECORDS)):
        yield from _predict(engine, batch, metrics, max_new_tokens, examples)


@dataclass
class _Item:
    """A record, and what the model can do with its right answer.

    Attributes:
        record: the record.
        tokens: of its right answer.
        writable: whether the model can write that.
        given: answers to score.
    """

    record: TaskRecord
    tokens: int
    writable: bool
    given: list[Choice]


def _predict(
    engine: Engine,
    batch: list[TaskRecord],
    metrics: Sequence[str],
    max_new_tokens: int | None,
    examples: Sequence[Record],
) -> Iterator[Prediction]:
    items = [_item(engine, record, metrics, examples) for record in batch]
    requests = [record.request for record in batch]
    asked = [i for i, item in enumerate(items) if item.given]
    scores: list[list[ChoiceScore]] = [[] for _ in batch]
    with _naming([batch[i] for i in asked]):
        found = engine.score([requests[i] for i in asked], [items[i].given for i in asked], examples)
    for i, scored in zip(asked, found, strict=True):
        scores[i] = scored
    written: list[GenerationResult | None] = [None] * len(batch)
    if "exact_match" in metrics:
        budget = max_new_tokens or 1 + max(item.tokens for item in items)
        with _naming(batch):
            written = list(engine.generate(requests, examples, max_new_tokens=budget, **GREEDY))
    for item, scored, result in zip(items, scores, written, strict=True):
        yield _prediction(item, scored, result, metrics)


def _item(engine: Engine, record: TaskRecord, metrics: Sequence[str], examples: Sequence[Record]) -> _Item:
    """Find out whether the right answer can be written, and which answers to score.

    Raises:
        DataError: the request, or the shape of the answer, is wrong.
    """
    with _naming([record]):
        prompt = engine.encode(record.request, examples)
        encoder = ChoiceEncoder(prompt, make_token_space(prompt, engine.tokenizer, engine.config), engine.tokenizer)
    writable = True
    try:
        tokens = encoder.encode(record.expected, "$.<ans>").num_targets
    except PromptError:  # a token that neither vocabulary nor request has; its shape is that of the request
        writable, tokens = False, len(engine.tokenizer.encode(str(record.expected))[0])
    except TokenizeError as error:
        raise DataError(f"{record.where}: {error}") from None
    given = list(record.choices or ()) if "choice_accuracy" in metrics else []
    if "loss" in metrics and writable and record.expected not in given:
        given.append(record.expected)
    return _Item(record, tokens, writable, given)


def _prediction(
    item: _Item, scores: list[ChoiceScore], result: GenerationResult | None, metrics: Sequence[str]
) -> Prediction:
    record, expected = item.record, item.record.expected
    logprob = None
    if "loss" in metrics and item.writable:
        logprob = next(score.logprob for score in scores if score.choice == expected)
    chosen: ChoiceScore | None = None
    if "choice_accuracy" in metrics and record.choices is not None:
        scores = scores[: len(record.choices)]
        chosen = max(scores, key=lambda score: score.logprob)
    return Prediction(
        where=record.where,
        task=record.task,
        expected=expected,
        answer=None if result is None else result.answer,
        exact=None if result is None else result.answer == expected and result.finish_reason == "stop",
        logprob=logprob,
        tokens=item.tokens,
        scores=() if chosen is None else tuple(scores),
        choice=None if chosen is None else chosen.choice,
        right=None if chosen is None else chosen.choice == expected,
    )


@contextmanager
def _naming(records: Sequence[TaskRecord]) -> Iterator[None]:
    """Say in errors which record is at fault, instead of which request."""
    try:
        yield
    except CpmBeeError as error:
        number = error.request if error.request is not None else 0 if len(records) == 1 else None
        if number is None or not isinstance(error, (CacheFullError, PromptError, TokenizeError)):
            raise
        reason = str(error).removeprefix(f"request {number}: ")
        raise DataError(f"{records[number].where}: {reason}") from None
