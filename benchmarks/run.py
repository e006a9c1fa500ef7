"""One whole run: models and peers, speed, quality and profile, into one result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpmbee.bench import fidelity
from cpmbee.bench.cell import CellSpec
from cpmbee.bench.checks import does_not_fit
from cpmbee.bench.peers.protocol import Target
from cpmbee.bench.peers.registry import PEERS, prepare
from cpmbee.bench.plan import Subject, Sweep, Workload
from cpmbee.bench.processes import run_module
from cpmbee.bench.records import Result
from cpmbee.bench.runner import Progress, measure
from cpmbee.errors import ConfigError
from cpmbee.folder import ModelFolder
from cpmbee.machine import physical_memory

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
        settled: a cell whose rates two processes agree on, to this share, needs no third.
        checkpoint: what the models were exported from.
        requests: JSON Lines to measure quality on.
        profile: whether our models are profiled, at the first workload.
    """

    sweep: Sweep
    peers: Sequence[str] = ()
    rounds: int = 3
    repetitions: int = 3
    attempts: int = 3
    settled: float = 0.0
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
    how = {"rounds": settings.rounds, "repetitions": settings.repetitions, "settled": settings.settled}
    result = Result({**about, **how})
    progress("making models of peers", 0.0)
    ours = [subject for subject, _ in found]
    targets = [Target(subject, folder.config, settings.checkpoint) for subject, folder in found]
    peers = prepare(settings.peers, targets, scratch, result)
    subjects = [each for subject in ours for each in (subject, *(p for p in peers if p.model == subject.model))]
    result.subjects = {subject.label: subject.to_dict() for subject in subjects}
    measure(
        result,
        _cells(subjects, settings.sweep, result),
        rounds=settings.rounds,
        repetitions=settings.repetitions,
        attempts=settings.attempts,
        settled=settings.settled,
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


def _cells(subjects: Sequence[Subject], sweep: Sweep, result: Result) -> list[tuple[Subject, Workload]]:
    """Workload by workload, those subjects that know it; peers that it leaves no memory for are noted in ``result``."""
    memory = physical_memory()
    cells = []
    for workload in sweep.workloads():
        for subject in subjects:
            if subject.engine != OURS:
                if not PEERS[subject.engine].can(workload):
                    continue
                if reason := does_not_fit(subject, workload, memory):
                    result.skipped.append((subject.label, reason))
                    continue
            cells.append((subject, workload))
    return cells


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
