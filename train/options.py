"""How to train: the options of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from cpmbee.errors import ConfigError
from cpmbee.train.schedule import BatchScaling, Schedule
from cpmbee.train.step import Precision

_CHOICES = {
    "schedule": ("cosine", "noam", "constant"),
    "batch_scaling": ("sqrt", "linear"),
    "precision": ("fp32", "bf16", "fp16"),
}
_AT_LEAST = {
    "steps": 1, "learning_rate": 0, "warmup": 0, "weight_decay": 0, "eps": 0, "max_grad_norm": 0, "accumulation": 1,
    "reference_batch": 1, "log_every": 1, "evaluate_every": 0, "patience": 1, "checkpoint_every": 0,
    "keep_checkpoints": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TrainerConfig:
    """How to train.

    Attributes:
        steps: optimizer steps.
        learning_rate: its peak.
        warmup: steps of linear warm-up.
        schedule: what follows: ``cosine`` decay to zero, ``noam`` (inverse square root), or ``constant``.
        reference_batch: rows of the global batch that ``learning_rate`` was tuned for; the rate follows the batch of
            this run. None takes the rate as it is.
        batch_scaling: how it follows: ``sqrt`` or ``linear``.
        weight_decay: of all matrices; norms and the bias table are not decayed.
        betas: AdamW's averages.
        eps: AdamW's.
        max_grad_norm: gradients are clipped to this norm.
        accumulation: batches of the source in one step.
        precision: ``fp32``, or autocast to ``bf16`` or ``fp16`` (with loss scaling); parameters stay fp32.
        activation_checkpointing: compute the layers again in the backward pass instead of storing what they computed.
        log_every: steps between progress lines.
        tensorboard: write TensorBoard files to the output folder, too.
        evaluate_every: steps between evaluations, 0 for none; the last step is evaluated as well.
        monitor: the value of an evaluation that decides which is best.
        higher_is_better: for ``monitor``.
        patience: stop after so many evaluations without improvement; None never does.
        checkpoint_every: steps between checkpoints; 0 for the best and the last step only.
        keep_checkpoints: newest ones that are kept, besides the best.
    """

    steps: int
    learning_rate: float = 1e-2
    warmup: int = 100
    schedule: Schedule = "cosine"
    reference_batch: int | None = None
    batch_scaling: BatchScaling = "sqrt"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    accumulation: int = 1
    precision: Precision = "fp32"
    activation_checkpointing: bool = False
    log_every: int = 200
    tensorboard: bool = False
    evaluate_every: int = 0
    monitor: str = "loss"
    higher_is_better: bool = False
    patience: int | None = None
    checkpoint_every: int = 0
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"training: {name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is None and name in ("reference_batch", "patience"):
                continue
            kinds = (int, float) if isinstance(getattr(TrainerConfig, name, 0), float) else (int,)
            if type(value) not in kinds or not least <= value < float("inf"):
                kind = "a number" if float in kinds else "an integer"
                raise ConfigError(f"training: {name} must be {kind} from {least} on, not {value!r}")
        for name in ("activation_checkpointing", "tensorboard", "higher_is_better"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"training: {name} must be true or false, not {getattr(self, name)!r}")
        if len(self.betas) != 2 or not all(type(b) in (int, float) and 0 <= b < 1 for b in self.betas):
            raise ConfigError(f"training: betas must be two numbers in [0, 1), not {self.betas!r}")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TrainerConfig:
        """Options as JSON gives them.

        Raises:
            ConfigError: an option is unknown, missing or out of range.
        """
        known = {option.name for option in fields(cls)}
        if unknown := sorted(set(raw) - known):
            raise ConfigError(f"training: no option {unknown[0]!r}; there are {', '.join(sorted(known))}")
        if "steps" not in raw:
            raise ConfigError("training: steps is missing")
        values = dict(raw)
        if isinstance(values.get("betas"), list):
            values["betas"] = tuple(values["betas"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """JSON data that `from_dict` reads."""
        return {**asdict(self), "betas": list(self.betas)}

    def changes_since(self, earlier: Mapping[str, Any]) -> str:
        """What differs from an earlier configuration's `to_dict`, for the log; empty if nothing does."""
        now = self.to_dict()
        return ", ".join(
            f"{name} {now.get(name)!r} (was {earlier.get(name)!r})"
            for name in sorted({*now, *earlier})
            if now.get(name) != earlier.get(name)
        )
