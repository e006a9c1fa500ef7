"""Ready transforms that make exercises of plain text: fill in what is masked, write on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cpmbee.errors import DataError
from cpmbee.train.data.markup import units
from cpmbee.train.data.records import Record
from cpmbee.train.data.transform import ANSWER, Apply, TooShortError, text_field


@dataclass(frozen=True)
class MaskSpans:
    """Replaces spans of a text by ``<mask_0>``, ``<mask_1>``, ...; the answer is what stood there.

    Attributes:
        field: where the record has its text.
        into: field of the sample that holds the masked text; the record's other fields are kept.
        share: of the characters that are masked, about.
        length: mean length of a span in characters; spans have 1 to 2 * length - 1.
        max_spans: at most so many.
    """

    field: str = "text"
    into: str = "document"
    share: float = 0.15
    length: int = 4
    max_spans: int = 16

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise DataError(f"share: must lie between 0 and 1, not {self.share}")
        if self.length < 1 or self.max_spans < 1:
            raise DataError("length and max_spans: must be at least 1")

    def plan(self, rng: np.random.Generator) -> Apply:
        """As `cpmbee.train.data.transform.Transform.plan`."""
        return lambda record, num_samples, rng: self(record, rng)

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """The sample of a record.

        Raises:
            TooShortError: the text is empty.
            DataError: there is no text.
        """
        text = text_field(record, self.field)
        parts = units(text)
        if not parts:
            raise TooShortError(f"the text in {self.field!r} is empty")
        taken = {part for part in parts if part.startswith("<mask")}
        names = (name for name in map("<mask_{}>".format, range(len(parts) + len(taken) + 1)) if name not in taken)
        answers: dict[str, str] = {}
        masked: list[str] = []
        end = 0
        for start, stop in self._spans(len(parts), rng):
            name = next(names)
            answers[name] = "".join(parts[start:stop])
            masked += [*parts[end:start], name]
            end = stop
        masked += parts[end:]
        rest = {key: value for key, value in record.items() if key not in (self.field, ANSWER)}
        return {self.into: "".join(masked), **rest, ANSWER: answers}

    def _spans(self, size: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Spans of ``size`` parts in order, at least one part between two."""
        count = min(self.max_spans, max(1, round(size * self.share / self.length)))
        lengths = rng.integers(1, 2 * self.length, count).tolist()
        while len(lengths) > 1 and sum(lengths) + len(lengths) - 1 > size:
            lengths.pop()
        lengths[0] = min(lengths[0], size)
        free = size - sum(lengths)
        starts = np.sort(rng.choice(free + 1, len(lengths), replace=False)).tolist()
        spans = []
        masked = 0
        for start, length in zip(starts, lengths, strict=True):
            spans.append((start + masked, start + masked + length))
            masked += length
        return spans


@dataclass(frozen=True)
class ContinueText:
    """Cuts a text in two; the answer is how it goes on.

    Attributes:
        field: where the record has its text.
        into: field of the sample that holds the beginning; the record's other fields are kept.
        min_share: of the text that the beginning and the rest each have at least.
    """

    field: str = "text"
    into: str = "input"
    min_share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.min_share <= 0.5:
            raise DataError(f"min_share: must lie between 0 and 0.5, not {self.min_share}")

    def plan(self, rng: np.random.Generator) -> Apply:
        """As `cpmbee.train.data.transform.Transform.plan`."""
        return lambda record, num_samples, rng: self(record, rng)

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        """The sample of a record.

        Raises:
            TooShortError: the text is too short to be cut.
            DataError: there is no text.
        """
        parts = units(text_field(record, self.field))
        if len(parts) < 2:
            raise TooShortError(f"the text in {self.field!r} has {len(parts)} characters, too few to be cut in two")
        least = min(max(1, round(len(parts) * self.min_share)), len(parts) // 2)
        cut = int(rng.integers(least, len(parts) - least + 1))
        rest = {key: value for key, value in record.items() if key not in (self.field, ANSWER)}
        return {self.into: "".join(parts[:cut]), **rest, ANSWER: "".join(parts[cut:])}
