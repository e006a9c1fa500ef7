"""The configuration file of ``cpmbee pretrain``.

    {"model": "checkpoint"                      a checkpoint to start from, or the fields of a new model:
     "model": {"hidden_size": 512, ...},
     "vocabulary": "vocab.txt",                 of a new model; a checkpoint brings its own
     "data": {"mixture": "mixture.json", "row_length": 512, "batch_rows": 16},
     "evaluation": {"mixture": "held_out.json", "batches": 20},
     "training": {"steps": 1000, ...},          the fields of TrainerConfig; checkpoint_every is 1000 unless given
     "seed": 0, "threads": 2}

Paths count from the file's folder. ``batch_rows`` are those of all processes together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpmbee.config import ModelConfig
from cpmbee.errors import ConfigError
from cpmbee.json_file import NOT_JSON, read_json_object
from cpmbee.train.options import TrainerConfig

_CHECKPOINT_EVERY = 1000  # steps, where nothing is said: whoever forgets it must not lose a day
_FIELDS = ("model", "vocabulary", "data", "evaluation", "training", "seed", "threads")


@dataclass(frozen=True)
class PretrainConfig:
    """What to pre-train on what, and how.

    Attributes:
        checkpoint: to start from; None for a new model.
        model: fields of a new model; ``vocab_size`` may be missing.
        vocabulary: file of the vocabulary; None for the checkpoint's own.
        mixture: of the training data.
        row_length: tokens of a row.
        batch_rows: rows of a batch, all processes together.
        evaluation_mixture: of the held-out data, if any.
        evaluation_batches: how many batches of it are looked at.
        training: the trainer's options.
        seed: of new parameters, dropout and the data's order.
        threads: of PyTorch in one process; 0 takes what suits the model.
    """

    checkpoint: Path | None
    model: dict[str, Any] | None
    vocabulary: Path | None
    mixture: Path
    row_length: int
    batch_rows: int
    evaluation_mixture: Path | None
    evaluation_batches: int
    training: TrainerConfig
    seed: int
    threads: int

    @classmethod
    def read(cls, file: Path, changes: Sequence[str] = ()) -> PretrainConfig:
        """Read a configuration file.

        Args:
            file: JSON.
            changes: ``path.to.field=value`` each; the value is JSON, or else a string.

        Raises:
            ConfigError: the file cannot be read, or a field is unknown, missing or out of range.
        """
        raw = read_json_object(file, "a pre-training configuration", ConfigError)
        for change in changes:
            _apply(raw, change)
        try:
            return cls._from_dict(raw, file.absolute().parent)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None

    @classmethod
    def _from_dict(cls, raw: dict[str, Any], folder: Path) -> PretrainConfig:
        _known("", raw, _FIELDS)
        data = _section(raw, "data", ("mixture", "row_length", "batch_rows"))
        evaluation = _section(raw, "evaluation", ("mixture", "batches")) if "evaluation" in raw else None
        model, vocabulary = raw.get("model"), raw.get("vocabulary")
        if not isinstance(model, str | dict):
            raise ConfigError("model must be the path of a checkpoint, or the fields of a new model")
        if isinstance(model, dict) and vocabulary is None:
            raise ConfigError("a new model needs a vocabulary")
        training = raw.get("training")
        if not isinstance(training, dict):
            raise ConfigError("training must be an object with at least steps")
        if evaluation is not None and "evaluate_every" not in training:
            raise ConfigError("training.evaluate_every must be given with an evaluation")
        return cls(
            checkpoint=folder / model if isinstance(model, str) else None,
            model=model if isinstance(model, dict) else None,
            vocabulary=None if vocabulary is None else folder / _text("vocabulary", vocabulary),
            mixture=folder / _text("data.mixture", data.get("mixture")),
            row_length=_integer("data.row_length", data.get("row_length"), 1),
            batch_rows=_integer("data.batch_rows", data.get("batch_rows"), 1),
            evaluation_mixture=None
            if evaluation is None
            else folder / _text("evaluation.mixture", evaluation.get("mixture")),
            evaluation_batches=1
            if evaluation is None
            else _integer("evaluation.batches", evaluation.get("batches", 10), 1),
            training=TrainerConfig.from_dict({"checkpoint_every": _CHECKPOINT_EVERY, **training}),
            seed=_integer("seed", raw.get("seed", 0), 0),
            threads=_integer("threads", raw.get("threads", 0), 0),
        )

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The shape of the new model.

        Raises:
            ConfigError: a field is missing, out of range, or at odds with the vocabulary.
        """
        config = ModelConfig.from_dict({"vocab_size": vocab_size, **(self.model or {})})
        if config.vocab_size < vocab_size:
            raise ConfigError(f"model.vocab_size {config.vocab_size} is less than the vocabulary's {vocab_size} tokens")
        return config


def _apply(raw: dict[str, Any], change: str) -> None:
    path, separator, text = change.partition("=")
    if not separator or not all(path.split(".")):
        raise ConfigError(f"{change!r} is no change of the configuration; write path.to.field=value")
    try:
        value = json.loads(text)
    except NOT_JSON:
        value = text
    *sections, field = path.split(".")
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{change!r}: {section} is not an object")
    raw[field] = value


def _section(raw: dict[str, Any], name: str, fields: Sequence[str]) -> dict[str, Any]:
    section = raw.get(name)
    if not isinstance(section, dict):
        raise ConfigError(f"{name} must be an object with {', '.join(fields)}")
    _known(f"{name}.", section, fields)
    return section


def _known(prefix: str, raw: dict[str, Any], fields: Sequence[str]) -> None:
    if unknown := [name for name in raw if name not in fields]:
        raise ConfigError(f"no field {prefix}{unknown[0]}; there are {', '.join(fields)}")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be a path, not {value!r}")
    return value


def _integer(name: str, value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise ConfigError(f"{name} must be an integer from {least} on, not {value!r}")
    return value
