"""One whole run: models and peers, speed, quality and profile, into one result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpmbee.bench import fidelity
from cpmbee.bench.cell import CellSpec
from cpmbee.bench.peers.protocol import Target
from cpmbee.bench.peers.registry import PEERS, prepare
from cpmbee.bench.plan import Subject, Sweep, Workload
from cpmbee.bench.processes import run_module
from cpmbee.bench.records import Result
from cpmbee.bench.runner import Progress, measure
from cpmbee.errors import ConfigError
from cpmbee.folder import ModelFolder

OURS = "cpmbee"


@dataclass(frozen=True)
class Settings:
    """What a run does.

    Attributes:
        sweep: workloads.
        peers: names of other engines.
        rounds: processes for each cell.
        repetitions: in each process.
        attempts: at a process that others disturb.
        checkpoint: what the models were exported from.
        requests: JSON Lines to measure quality on.
        profile: whether our models are profiled, at the first workload.
    """

    sweep: Sweep
    peers: Sequence[str] = ()
    rounds: int = 3
    repetitions: int = 3
    attempts: int = 3
    checkpoint: Path | None = None
    requests: Path | None = None
    profile: bool = False


def run(
    found: Sequence[tuple[Subject, ModelFolder]],
    settings: Settings,
    scratch: Path,
    about: dict[str, Any],
    progress: Progress,
) -> Result:
    """Measure everything.

    Args:
        found: our models, checked.
        settings: what to do.
        scratch: where models of peers and the reference's logits go.
        about: command, commit, machine and versions.
        progress: is told what is being done.

    Raises:
        ConfigError: quality is asked for and nothing says what fp32 computes.
    """
    reference = _reference(found, settings)
    scratch.mkdir(parents=True, exist_ok=True)
    result = Result({**about, "rounds": settings.rounds, "repetitions": settings.repetitions})
    progress("making models of peers", 0.0)
    ours = [subject for subject, _ in found]
    targets = [Target(subject, folder.config, settings.checkpoint) for subject, folder in found]
    peers = prepare(settings.peers, targets, scratch, result)
    subjects = [each for subject in ours for each in (subject, *(p for p in peers if p.model == subject.model))]
    result.subjects = {subject.label: subject.to_dict() for subject in subjects}
    measure(
        result,
        _cells(subjects, settings.sweep),
        rounds=settings.rounds,
        repetitions=settings.repetitions,
        attempts=settings.attempts,
        progress=progress,
    )
    if settings.requests is not None and reference is not None:
        progress("quality", 1.0)
        vocabulary = found[0][1].vocabulary.resolve()
        fidelity.measure(result, subjects, settings.requests.resolve(), reference.resolve(), vocabulary, scratch)
    if settings.profile:
        workload = next(settings.sweep.workloads())
        for subject in ours:
            progress(f"profile of {subject.label}", 1.0)
            spec = CellSpec(str(subject.path), workload, 1)
            try:
                result.profile[subject.label] = run_module("cpmbee.bench.step_profile", [spec.to_json()]).value
            except RuntimeError as error:  # what has been measured so far is not lost for that
                result.skipped.append((subject.label, f"profile: {error}"))
    return result


def _cells(subjects: Sequence[Subject], sweep: Sweep) -> list[tuple[Subject, Workload]]:
    """Workload by workload, those subjects that know it."""
    return [
        (subject, workload)
        for workload in sweep.workloads()
        for subject in subjects
        if subject.engine == OURS or PEERS[subject.engine].can(workload)
    ]


def _reference(found: Sequence[tuple[Subject, ModelFolder]], settings: Settings) -> Path | None:
    """What fp32 computes: the checkpoint, else a model in fp32."""
    if settings.requests is None:
        return None
    if settings.checkpoint is not None:
        return settings.checkpoint
    for subject, folder in found:
        if subject.precision == "fp32":
            return folder.path
    raise ConfigError("quality is measured against fp32: name the --checkpoint, or measure an fp32 MODEL, too")
