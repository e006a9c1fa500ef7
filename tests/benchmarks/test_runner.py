"""How often a cell is measured, and what beside it."""

from pathlib import Path
from typing import Any

import pytest

from cpmbee.bench import runner
from cpmbee.bench.cost import Operations
from cpmbee.bench.plan import Subject, Workload
from cpmbee.bench.processes import Memory, Outcome
from cpmbee.bench.records import Result
from tests.benchmarks.samples import ABOUT, make_round

WORK = Workload(100, 5, threads=2)


def subject(label: str) -> Subject:
    operations = Operations(2000.0, 16.0, 500.0)
    return Subject(label, label, "cpmbee", "m", Path(label), "int4", "fp32", 1, 1, 1, operations, 1, 1, 1)


def test_only_a_cell_whose_processes_differ_is_measured_a_third_time(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {"steady": [0.010, 0.0101, 0.5], "unsteady": [0.010, 0.012, 0.011]}

    def measure_once(subject: Subject, *_: Any) -> Any:
        return make_round(steps[subject.label].pop(0))

    monkeypatch.setattr(runner, "measure_once", measure_once)
    result = Result(dict(ABOUT))
    subjects = [subject("steady"), subject("unsteady")]
    result.subjects = {each.label: each.to_dict() for each in subjects}
    cells = [(each, WORK) for each in subjects]
    shown: list[tuple[str, float]] = []
    runner.measure(
        result, cells, rounds=3, repetitions=1, attempts=1, settled=0.03, progress=lambda *now: shown.append(now)
    )
    assert [len(cell.rounds) for cell in result.cells] == [2, 3]
    assert [fraction for _, fraction in shown] == sorted(fraction for _, fraction in shown)


def test_memory_is_read_before_and_after_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    rates = iter([50e9, 70e9])
    sample = '{"load": null, "cold": null, "encode": [], "prefill": [1], "decode": [1], "steps": [], "cache_bytes": 0'

    def read_bandwidth(threads: int, _: Any) -> float:
        done.append(f"read by {threads}")
        return next(rates)

    def run_module(*_: Any) -> Outcome:
        done.append("process")
        return Outcome(sample + ', "memory": {}}', 1.0, Memory(5, 4, 3))

    monkeypatch.setattr(runner, "read_bandwidth", read_bandwidth)
    monkeypatch.setattr(runner, "run_module", run_module)
    measured = runner.measure_once(subject("model"), WORK, 1, 1, runner.ordinary_memory())
    assert done == ["read by 2", "process", "read by 2"]
    assert measured.bandwidth == [50e9, 70e9]
