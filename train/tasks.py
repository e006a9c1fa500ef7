"""Records of supervised tasks: requests with the right answers, and where there are some, the choices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cpmbee.choices import Choice
from cpmbee.errors import DataError
from cpmbee.train.data.records import Record, RecordSet
from cpmbee.train.jsonl import where

ANSWER = "<ans>"
OPTIONS = "options"
ONLY_TASK = "all"


@dataclass(frozen=True)
class TaskRecord:
    """One request with its right answer.

    Attributes:
        where: it was read, for messages.
        request: what the model sees, the right answer under ``<ans>`` included.
        task: the task it belongs to.
        choices: answers to choose from; None where there are none.
    """

    where: str
    request: Record
    task: str
    choices: tuple[Choice, ...] | None

    @property
    def expected(self) -> Choice:
        """The right answer: a text, or a dict of them."""
        answer: Choice = self.request[ANSWER]
        return answer


@dataclass(frozen=True)
class TaskFields:
    """Which fields of a record mean something beside the request.

    Attributes:
        task: a field with the name of the record's task, which the model does not see; None for one task.
        choices: a field with the choices: a list of answers, which the model does not see, or a dict whose keys are
            the answers (``{"<option_0>": "...", "<option_1>": "..."}``), which it does. None takes ``options`` where
            that is a dict.
    """

    task: str | None = None
    choices: str | None = None

    def read(self, record: Record, place: str) -> TaskRecord:
        """Take a record apart; it is not modified.

        Raises:
            DataError: it has no ``<ans>``, lacks a field, or its answer is not among its choices; names ``place``.
        """
        if ANSWER not in record:
            raise DataError(f'{place}: $: has no "{ANSWER}" key, under which the right answer belongs')
        request = dict(record)
        task = ONLY_TASK
        if self.task is not None:
            task = _taken(request, self.task, place)
            if not isinstance(task, str):
                raise DataError(f"{place}: $.{self.task}: expected the name of a task, not {type(task).__name__}")
        choices = self._choices(request, place)
        if choices is not None and record[ANSWER] not in choices:
            raise DataError(f"{place}: $.{ANSWER}: {record[ANSWER]!r:.80} is not among its {len(choices)} choices")
        return TaskRecord(place, request, task, choices)

    def _choices(self, request: Record, place: str) -> tuple[Choice, ...] | None:
        if self.choices is None:
            options = request.get(OPTIONS)
            return tuple(options) if isinstance(options, dict) and options else None
        if self.choices not in request:
            raise DataError(f"{place}: $: has no field {self.choices!r}")
        choices = request[self.choices]
        if isinstance(choices, list):
            del request[self.choices]
        elif not isinstance(choices, dict):
            kind = type(choices).__name__
            raise DataError(
                f"{place}: $.{self.choices}: expected choices, a list or a dict with them as keys, not {kind}"
            )
        if not choices:
            raise DataError(f"{place}: $.{self.choices}: has no choices")
        return tuple(choices)


def _taken(request: Record, name: str, place: str) -> Any:
    if name not in request:
        raise DataError(f"{place}: $: has no field {name!r}")
    return request.pop(name)


def read_tasks(records: RecordSet, fields: TaskFields) -> Iterator[TaskRecord]:
    """All records, taken apart.

    Raises:
        DataError: a record is not one; names the file and the line.
    """
    for index in range(len(records)):
        yield fields.read(records[index], where(records, index))
