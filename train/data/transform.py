"""What turns a stored record into a training sample, and the combinations that a mixture can name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cpmbee.errors import DataError
from cpmbee.train.data.records import Record

ANSWER = "<ans>"


class TooShortError(DataError):
    """A record whose text is too short for its transform; streams leave such records out and count them."""


# (record, number of in-context examples, source of chance) -> the sample
Apply = Callable[[Record, int, np.random.Generator], Record]


class Transform(Protocol):
    """Makes samples of records."""

    def plan(self, rng: np.random.Generator) -> Apply:
        """Draw what a request and its in-context examples share, such as their layout.

        Returns:
            What makes a sample of each of their records; it does not modify the record.
        """
        ...


class Identity:
    """Takes a record as it is."""

    def plan(self, rng: np.random.Generator) -> Apply:
        """As `Transform.plan`."""
        return lambda record, num_samples, rng: record


@dataclass(frozen=True)
class Choice:
    """One of several transforms, drawn evenly for each request.

    Attributes:
        options: at least one.
    """

    options: Sequence[Transform]

    def plan(self, rng: np.random.Generator) -> Apply:
        """As `Transform.plan`."""
        chosen = 0 if len(self.options) == 1 else int(rng.integers(len(self.options)))
        return self.options[chosen].plan(rng)


@dataclass(frozen=True)
class Chain:
    """Several transforms, each of which gets what the one before it made.

    Attributes:
        steps: in order.
    """

    steps: Sequence[Transform]

    def plan(self, rng: np.random.Generator) -> Apply:
        """As `Transform.plan`."""
        steps = [step.plan(rng) for step in self.steps]

        def apply(record: Record, num_samples: int, rng: np.random.Generator) -> Record:
            for step in steps:
                record = step(record, num_samples, rng)
            return record

        return apply


def text_field(record: Record, field: str) -> str:
    """The text in a field of the root.

    Raises:
        DataError: there is no such field, or it holds no text.
    """
    value = record.get(field)
    if not isinstance(value, str):
        problem = "has no field" if field not in record else "has no text in the field"
        raise DataError(f"the record {problem} {field!r}; its fields are {', '.join(map(repr, record))}")
    return value
