"""Whether a model differs from exact arithmetic by more than rounding explains.

Rounded activations tip over at every difference of sums, so two models that round alike do not agree closely; but over
many positions their squared errors have the same mean. What is compared is therefore the squared distance of logits
from the exact ones with that of a model known to round right (`cpmbee.export.rounded_model`) on the same calls: in the
mean, for every position, for every token of the vocabulary, and for single logits. Each distance is taken in units of
what rounding does to that token's logits on average, so that neither a model's temperature nor tokens with long
embeddings decide. ``benchmarks/verification_power.py`` measures how far right and wrong exports are from the bounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cpmbee.export.comparison import TOLERANCE, Call
from cpmbee.export.quality import kl_divergence
from cpmbee.export.report import Check

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Bounds:
    """How many times the squared error of rounding passes.

    Attributes:
        mean: over the positions of one kind of call.
        position: at one position, over the vocabulary.
        token: of one token, over all positions.
        logit: of one logit, relative to its position and token.
    """

    mean: float = 2.0
    position: float = 40.0
    token: float = 5.0
    logit: float = 20.0**2


BOUNDS = Bounds()


@dataclass
class Found:
    """What one kind of call showed: the largest ratios of squared errors to those of rounding; see `Bounds`."""

    calls: int = 0
    positions: int = 0
    error: float = 0.0
    expected: float = 0.0
    position: float = 0.0
    logit: float = 0.0
    kl: float = 0.0
    expected_kl: float = 0.0
    different: int = 0

    @property
    def mean(self) -> float:
        """Ratio of mean squared errors."""
        return self.error / self.expected

    def check(self, name: str, reference: str) -> Check:
        """Judge."""
        passed = self.mean <= BOUNDS.mean and self.position <= BOUNDS.position and self.logit <= BOUNDS.logit
        positions = max(1, self.positions)
        detail = (
            f"against the {reference}: squared error {self.mean:.2f} times that of rounding over {self.positions} "
            f"positions (at most {self.position:.1f} at one), KL {self.kl / positions:.1e} nats "
            f"({self.expected_kl / positions:.1e} by rounding), likeliest token the same at "
            f"{self.positions - self.different}, {self.calls} call{'s' if self.calls > 1 else ''}"
        )
        if not passed and self.mean <= BOUNDS.mean:
            detail += f"; wrong at single positions (logits up to {self.logit**0.5:.0f} standard deviations off)"
        return Check(name, bool(passed), detail, self.mean, BOUNDS.mean)


class Measured(NamedTuple):
    """What a comparison showed.

    Attributes:
        kinds: by the kind of call.
        token: the largest ratio of squared errors of one token's logits, over all positions.
    """

    kinds: dict[str, Found]
    token: float


@dataclass
class Rounding:
    """What rounding does to the logits of some calls.

    Args:
        calls: with the exact logits.
        rounded: logits of the same calls by a model that is known to round right.
    """

    calls: Sequence[Call]
    rounded: Sequence[Float32]
    _floor: float = field(init=False)  # squared error that passes without any rounding
    _tokens: Float64 = field(init=False)  # mean squared error of each token of the vocabulary, floor included
    _extension: float = field(init=False)  # the same of all extension tokens

    def __post_init__(self) -> None:
        reach = max((float(np.ptp(call.logits)) for call in self.calls if call.logits.size), default=0.0)
        self._floor = (TOLERANCE * (reach or 1.0)) ** 2
        vocab = min(call.logits.shape[-1] - len(call.inputs.ext_ids) for call in self.calls)
        tokens, positions, extension, extended = np.zeros(vocab), 0, 0.0, 0
        for call, rounded in zip(self.calls, self.rounded, strict=True):
            squares = _squares(rounded, call.logits)
            tokens += squares[:, :vocab].sum(0)
            positions += len(squares)
            extension += float(squares[:, vocab:].sum())
            extended += squares[:, vocab:].size
        self._tokens = tokens / max(1, positions) + self._floor
        self._extension = extension / max(1, extended) + self._floor

    def compare(self, answers: Iterable[Float32], who: str, reference: str) -> list[Check]:
        """Judge a model that rounds, too.

        Args:
            answers: its logits, call by call.
            who: it is, for the report.
            reference: what computed the exact logits.

        Returns:
            One check for each kind of call, and one of all tokens.
        """
        kinds, token = self.measure(answers)
        checks = [found.check(f"{kind}, {who}", reference) for kind, found in kinds.items()]
        detail = (
            f"against the {reference}: the squared error of one token's logits is at most {token:.2f} times that of"
        )
        return [*checks, Check(f"tokens, {who}", token <= BOUNDS.token, f"{detail} rounding", token, BOUNDS.token)]

    def measure(self, answers: Iterable[Float32]) -> Measured:
        """Ratios of squared errors; see `compare`."""
        kinds: dict[str, Found] = {}
        tokens = np.zeros(len(self._tokens))
        expected_tokens = np.zeros(len(self._tokens))
        for call, rounded, ours in zip(self.calls, self.rounded, answers, strict=True):
            vocab = len(tokens)
            unit = np.concatenate([self._tokens, np.full(call.logits.shape[-1] - vocab, self._extension)])
            with np.errstate(invalid="ignore", over="ignore"):
                error = np.nan_to_num(_squares(ours, call.logits) / unit, nan=np.inf, posinf=np.inf)
                expected = (_squares(rounded, call.logits) + self._floor) / unit
            by_position = error.mean(-1)
            usual = np.maximum(expected.mean(-1), 1.0)
            found = kinds.setdefault(call.kind, Found())
            found.calls += 1
            found.positions += len(error)
            found.error += float(by_position.sum())
            found.expected += float(expected.mean(-1).sum())
            found.position = max(found.position, float((by_position / usual).max()))
            with np.errstate(invalid="ignore"):
                logit = (error.max(-1) / np.maximum(usual, by_position)).max()
            found.logit = max(found.logit, float(np.nan_to_num(logit, nan=np.inf)))
            exact, theirs, our_rows = (_rows(logits) for logits in (call.logits, rounded, ours))
            with np.errstate(invalid="ignore", over="ignore"):
                found.kl += float(kl_divergence(exact, our_rows).sum())
            found.expected_kl += float(kl_divergence(exact, theirs).sum())
            found.different += int((exact.argmax(-1) != our_rows.argmax(-1)).sum())
            tokens += error[:, :vocab].sum(0)
            expected_tokens += expected[:, :vocab].sum(0)
        return Measured(kinds, float((tokens / expected_tokens).max()))


def _rows(logits: Float32) -> Float32:
    """(B, R, V + E) -> (B * R, V + E)."""
    return logits.reshape(-1, logits.shape[-1])


def _squares(ours: Float32, exact: Float32) -> Float64:
    """Squared differences, (positions, V + E)."""
    squares: Float64 = np.square(_rows(ours).astype(np.float64) - _rows(exact))
    return squares
