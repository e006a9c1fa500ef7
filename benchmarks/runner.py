"""Carries out a plan: every cell in a process of its own, models taking turns, the bandwidth of memory beside them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpmbee.bench.bandwidth import ordinary_memory, read_bandwidth
from cpmbee.bench.cell import CellSpec
from cpmbee.bench.metrics import summarize
from cpmbee.bench.plan import Subject, Workload
from cpmbee.bench.processes import Memory, Outcome, run_module, undisturbed
from cpmbee.bench.records import Cell, Result, Round

Progress = Callable[[str, float], None]

JUDGED = ("prefill_tokens_per_s", "decode_tokens_per_s")  # what processes have to agree on
_log = logging.getLogger("cpmbee.bench")


def measure(
    result: Result,
    cells: Sequence[tuple[Subject, Workload]],
    *,
    rounds: int,
    repetitions: int,
    attempts: int,
    settled: float,
    progress: Progress,
) -> None:
    """Measure all cells, round by round, and add them to ``result``.

    Within a round the subjects take turns at each workload, so that a slow minute of the machine hits all of them. A
    cell that fails is skipped with its reason.

    Args:
        result: gets cells and what was skipped.
        cells: what is measured, in the order of a round.
        rounds: processes that measure each cell, one after another, at most.
        settled: a cell whose rates two processes agree on, to this share, is not measured again.
        repetitions: measured in each process.
        attempts: at one process, as long as others disturb it.
        progress: is told what is being done.
    """
    found = {cell: Cell(cell[0].label, cell[1]) for cell in cells}
    done_with: set[tuple[Subject, Workload]] = set()
    memory = ordinary_memory()
    done, total = 0, rounds * len(cells)
    for _ in range(rounds):
        for cell in cells:
            subject, workload = cell
            progress(f"{subject.label}, prompt {workload.prompt}", done / total)
            done += 1
            if cell in done_with:
                continue
            try:
                found[cell].rounds.append(measure_once(subject, workload, repetitions, attempts, memory))
                if is_settled(result, found[cell], settled):
                    done_with.add(cell)
            except RuntimeError as error:
                done_with.add(cell)
                result.skipped.append((subject.label, f"prompt {workload.prompt}: {error}"))
                _log.warning("%s: %s", subject.label, error)
    result.cells += [cell for cell in found.values() if cell.rounds]


def is_settled(result: Result, cell: Cell, settled: float) -> bool:
    """Whether at least two processes agree on both rates of a cell."""
    found = summarize(result, cell)
    return len(cell.rounds) > 1 and all(found[key].spread <= settled for key in JUDGED if key in found)


def measure_once(
    subject: Subject, workload: Workload, repetitions: int, attempts: int, memory: NDArray[np.int32]
) -> Round:
    """One process, and the bandwidth of memory before and after it; another one as long as others disturb it.

    Args:
        subject: what is measured.
        workload: what it is asked.
        repetitions: in the process.
        attempts: at most.
        memory: what is read to measure the bandwidth; see `cpmbee.bench.bandwidth.ordinary_memory`.

    Raises:
        RuntimeError: it failed.
    """
    spec = CellSpec(str(subject.path), workload, repetitions, dict(subject.options))

    def work() -> tuple[Outcome, list[float]]:
        before = read_bandwidth(workload.threads, memory)
        outcome = run_module(subject.module, [spec.to_json()], dict(subject.environment))
        return outcome, [before, read_bandwidth(workload.threads, memory)]

    (outcome, bandwidth), others = undisturbed(work, attempts)
    value: dict[str, Any] = outcome.value
    peak = outcome.memory
    peak.include(Memory(**value.pop("memory")))  # the process of itself, or of one that it started
    return Round(
        **value,
        peak_resident=peak.resident,
        peak_anonymous=peak.anonymous,
        peak_file=peak.file,
        bandwidth=bandwidth,
        disturbed=round(others, 3),
    )
