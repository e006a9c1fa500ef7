"""Record what one model computes, replay it on another, and say how far apart they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cpmbee.export.probes import GraphInputs, Probe, batch_inputs
from cpmbee.export.report import Check

Float32 = NDArray[np.float32]

PROMPT, STEP, BATCH = "prompt logits", "cached step logits", "padded batch logits"  # kinds of calls
TOLERANCE = 1e-4  # of logits, relative to their range, where nothing is rounded that the reference does not round
NOISE_TOLERANCE, MOST_NOISE = 30.0, 1e-2  # of what fp32 itself does to a model that magnifies it, and the most of all


class SteppedModel(Protocol):
    """A model with a cache, called like the graph."""

    def run(self, inputs: GraphInputs) -> Float32:
        """Logits (B, R, V + E); the new tokens go into the cache."""


class LogitsModel(Protocol):
    """A model that answers calls that are known beforehand."""

    def run_all(self, inputs: Sequence[GraphInputs]) -> Iterator[Float32]:
        """Logits (B, R, V + E) of one call after the other; what a call writes to the cache, the next ones find."""


class Plan(NamedTuple):
    """A call whose tokens are known before any model has run.

    Attributes:
        kind: what it exercises.
        inputs: of the call.
        places: for each of its sequences the probe and the token that the call begins with.
    """

    kind: str
    inputs: GraphInputs
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Call:
    """One call and what the recorded model answered.

    Attributes:
        kind: what it exercises; calls of one kind make one check.
        inputs: of the call.
        logits: (B, R, V + E).
    """

    kind: str
    inputs: GraphInputs
    logits: Float32


def all_ext(probes: Sequence[Probe]) -> list[tuple[int, int]]:
    """The extension tokens of all probes, each once, in first-seen order: the extension vocabulary of a batch."""
    return list(dict.fromkeys(token for probe in probes for token in probe.ext))


def record(model: SteppedModel, probes: Sequence[Probe], steps: int) -> list[Call]:
    """Run each probe alone, let the model write ``steps`` greedy tokens on the cache, then run all as one batch."""
    calls = []
    ext = all_ext(probes)
    for probe in probes:
        calls.append(_call(model, PROMPT, probe.inputs(0, ext)))
        for _ in range(steps):
            column = int(calls[-1].logits[0, -1].argmax())
            vocab_size = calls[-1].logits.shape[-1] - len(ext)
            probe.append((column, 0) if column < vocab_size else ext[column - vocab_size])
            calls.append(_call(model, STEP, probe.inputs(len(probe) - 1, ext)))
    calls.append(_call(model, BATCH, batch_inputs(probes, 0, ext)))
    return calls


def plan(probes: Sequence[Probe], steps: int) -> list[Plan]:
    """Calls like those of `record` for models that run piece by piece: the tokens of the prompt are the answer, too."""
    plans = []
    ext = all_ext(probes)
    for number, probe in enumerate(probes):
        plans.append(Plan(PROMPT, probe.inputs(0, ext), ((number, 0),)))
        for step in range(steps):
            probe.append((probe.ids[step], probe.subs[step]))
            plans.append(Plan(STEP, probe.inputs(len(probe) - 1, ext), ((number, len(probe) - 1),)))
    places = tuple((number, 0) for number in range(len(probes)))
    return [*plans, Plan(BATCH, batch_inputs(probes, 0, ext), places)]


def replay(model: LogitsModel, calls: Sequence[Call], who: str, reference: str) -> list[Check]:
    """Repeat recorded calls on ``model`` and compare; one check per kind of call."""
    return compare(model.run_all([call.inputs for call in calls]), calls, who, reference)


def compare(answers: Iterable[Float32], calls: Sequence[Call], who: str, reference: str) -> list[Check]:
    """Compare logits of a model that rounds nothing, call by call; one check per kind of call.

    Where all logits are within the tolerance, two models choose different tokens only if the reference's own margin is
    below twice the error: a tie, and not looked at.
    """
    errors: dict[str, list[float]] = {}
    for call, logits in zip(calls, answers, strict=True):
        errors.setdefault(call.kind, []).append(_difference(logits, call.logits))
    checks = []
    for kind, found in errors.items():
        calls_made = f"{len(found)} call{'s' if len(found) > 1 else ''}"
        detail = f"against the {reference}: largest difference {max(found):.1e} of the logits' range, {calls_made}"
        checks.append(Check(f"{kind}, {who}", max(found) <= TOLERANCE, detail, max(found), TOLERANCE))
    return checks


def fp32_noise(exact: Iterable[Float32], calls: Sequence[Call]) -> float:
    """What fp32 arithmetic did to recorded logits: the largest difference from those of fp64, relative to the range."""
    return max(_difference(logits, call.logits) for call, logits in zip(calls, exact, strict=True))


def allow_noise(checks: Sequence[Check], noise: float) -> list[Check]:
    """Judge `compare`'s checks again for a model in which fp32 itself makes errors; see `fp32_noise`."""
    tolerance = min(MOST_NOISE, max(TOLERANCE, NOISE_TOLERANCE * noise))
    return [
        replace(
            check,
            passed=check.error is not None and check.error <= tolerance,
            tolerance=tolerance,
            detail=f"{check.detail}; fp32 itself moves them by {noise:.1e}",
        )
        for check in checks
    ]


def _difference(logits: Float32, expected: Float32) -> float:
    """The largest, relative to the range of what is expected; infinite for NaN."""
    with np.errstate(invalid="ignore"):
        difference = np.abs(logits - expected).max()
    return float(difference) / (float(np.ptp(expected)) or 1.0) if np.isfinite(difference) else float("inf")


def _call(model: SteppedModel, kind: str, inputs: GraphInputs) -> Call:
    return Call(kind, inputs, model.run(inputs))
