"""Options of one generation: what a caller may set, their defaults, and the checks that refuse nonsense early."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cpmbee.errors import ConfigError
from cpmbee.json_file import read_json_object
from cpmbee.option_values import plain_number, shown

MAX_BEAMS = 64
MAX_NEW_TOKENS = 1 << 20


@dataclass(frozen=True)
class GenerationConfig:
    """How to write the answers of a request.

    The default is greedy search. ``beam_size > 1`` is beam search; setting ``temperature``, ``top_k`` or ``top_p`` is
    sampling. The two do not combine. NumPy's numbers are taken as Python's.

    Attributes:
        beam_size: hypotheses kept side by side; 1 is greedy search.
        max_new_tokens: length budget over all answers of the request together; the ends of answers count too.
        repetition_penalty: logits of tokens written before are divided (if positive) or multiplied by it; 1 is off.
        repetition_window: how many of the last written tokens the penalty looks at; None for all of them.
        temperature: of sampling; 0 is greedy, None is "not set" (1 when ``top_k`` or ``top_p`` asks for sampling).
        top_k: sample among the k likeliest tokens only; None for all of them.
        top_p: sample among the likeliest tokens that together reach this probability; None for all of them.
        seed: makes sampling repeatable; None draws a new one for each call.
    """

    beam_size: int = 1
    max_new_tokens: int = 100
    repetition_penalty: float = 1.0
    repetition_window: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain_number(getattr(self, field.name)))
        _check_int("beam_size", self.beam_size, 1, MAX_BEAMS)
        _check_int("max_new_tokens", self.max_new_tokens, 1, MAX_NEW_TOKENS)
        _check_float("repetition_penalty", self.repetition_penalty, 1e-4, 1e4)
        if self.repetition_window is not None:
            _check_int("repetition_window", self.repetition_window, 1, MAX_NEW_TOKENS)
        if self.temperature is not None:
            _check_float("temperature", self.temperature, 0.0, 1e4)
        if self.top_k is not None:
            _check_int("top_k", self.top_k, 1, 1 << 24)
        if self.top_p is not None:
            _check_float("top_p", self.top_p, 0.0, 1.0, exclusive=True)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, (1 << 63) - 1)
        if self.sampling and self.beam_size > 1:
            raise ConfigError(
                f"beam_size {self.beam_size} does not combine with sampling; "
                "set beam_size to 1, or leave temperature, top_k and top_p out"
            )

    @property
    def sampling(self) -> bool:
        """Whether tokens are drawn at random rather than searched."""
        if self.temperature is not None:
            return self.temperature > 0
        return self.top_k is not None or self.top_p is not None

    def updated(self, /, **options: Any) -> GenerationConfig:
        """A copy with some options replaced.

        Raises:
            ConfigError: an option is unknown (names the closest known ones) or out of range.
        """
        check_names(options)
        return replace(self, **options)

    @classmethod
    def from_file(cls, path: str | Path) -> GenerationConfig:
        """Read ``generation_config.json``; names that are not ours are an error, as everywhere.

        Raises:
            ConfigError: the file cannot be read or holds an option that does not exist; names the file.
        """
        raw = read_json_object(Path(path), "the generation defaults", ConfigError)
        try:
            return cls().updated(**raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The options that are set, as JSON-ready values."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def check_names(options: Mapping[str, Any]) -> None:
    """Refuse options that do not exist, with the closest ones that do."""
    known = [field.name for field in fields(GenerationConfig)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name[:80], known, n=3) or known
            raise ConfigError(f"unknown generation option {shown(name)}; did you mean {', '.join(near)}?")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{name} must be an integer from {low} to {high}, not {shown(value)}")


def _check_float(name: str, value: object, low: float, high: float, *, exclusive: bool = False) -> None:
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not valid or (exclusive and value == low):
        bound = f"more than {low:g}" if exclusive else f"at least {low:g}"
        raise ConfigError(f"{name} must be a number of {bound} and at most {high:g}, not {shown(value)}")
