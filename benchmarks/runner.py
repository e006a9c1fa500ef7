"""Carries out a plan: every cell in a process of its own, models taking turns, the bandwidth of memory beside them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from cpmbee.bench.cell import CellSpec
from cpmbee.bench.plan import Subject, Workload
from cpmbee.bench.processes import Memory, run_module, undisturbed
from cpmbee.bench.records import Cell, Result, Round

Progress = Callable[[str, float], None]

_log = logging.getLogger("cpmbee.bench")


def measure(
    result: Result,
    cells: Sequence[tuple[Subject, Workload]],
    *,
    rounds: int,
    repetitions: int,
    attempts: int,
    progress: Progress,
) -> None:
    """Measure all cells, round by round, and add them to ``result``.

    Within a round the subjects take turns at each workload, so that a slow minute of the machine hits all of them;
    before each round memory's read bandwidth is measured. A cell that fails is skipped with its reason.

    Args:
        result: gets bandwidth, cells and what was skipped.
        cells: what is measured, in the order of a round.
        rounds: processes that measure each cell, one after another.
        repetitions: measured in each process.
        attempts: at one process, as long as others disturb it.
        progress: is told what is being done.
    """
    found = {cell: Cell(cell[0].label, cell[1]) for cell in cells}
    threads = sorted({workload.threads for _, workload in cells})
    failed: set[tuple[Subject, Workload]] = set()
    done, total = 0, rounds * len(cells)
    for _ in range(rounds):
        progress("memory bandwidth", done / total)
        for count, rate in bandwidths(threads, attempts).items():
            result.bandwidth.setdefault(count, []).append(rate)
        for cell in cells:
            subject, workload = cell
            progress(f"{subject.label}, prompt {workload.prompt}", done / total)
            done += 1
            if cell in failed:
                continue
            try:
                found[cell].rounds.append(measure_once(subject, workload, repetitions, attempts))
            except RuntimeError as error:
                failed.add(cell)
                result.skipped.append((subject.label, f"prompt {workload.prompt}: {error}"))
                _log.warning("%s: %s", subject.label, error)
    result.cells += [cell for cell in found.values() if cell.rounds]


def bandwidths(threads: Sequence[int], attempts: int) -> dict[int, float]:
    """Bytes per second that each number of threads reads, in a process of its own."""
    arguments = [str(count) for count in threads]
    outcome, _ = undisturbed(lambda: run_module("cpmbee.bench.bandwidth", arguments), attempts)
    return {int(count): rate for count, rate in outcome.value.items()}


def measure_once(subject: Subject, workload: Workload, repetitions: int, attempts: int) -> Round:
    """One process; another one as long as others disturb it.

    Raises:
        RuntimeError: it failed.
    """
    spec = CellSpec(str(subject.path), workload, repetitions, dict(subject.options))
    outcome, others = undisturbed(
        lambda: run_module(subject.module, [spec.to_json()], dict(subject.environment)), attempts
    )
    value: dict[str, Any] = outcome.value
    memory = outcome.memory
    memory.include(Memory(**value.pop("memory")))  # the process of itself, or of one that it started
    return Round(
        **value,
        peak_resident=memory.resident,
        peak_anonymous=memory.anonymous,
        peak_file=memory.file,
        disturbed=round(others, 3),
    )
