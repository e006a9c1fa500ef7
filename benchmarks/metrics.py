"""What a table says about a cell: one number per process and metric, made from its samples."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpmbee.bench.cost import Operations
from cpmbee.bench.plan import Workload
from cpmbee.bench.records import Cell, Result, Round

Value = Callable[["Context", Round], float | None]


@dataclass(frozen=True)
class Context:
    """What a metric needs beside the samples.

    Attributes:
        workload: that was asked.
        subject: `cpmbee.bench.plan.Subject.to_dict`.
        processor_cache: bytes of the processor's largest cache; weights that fit it are not read from memory.
    """

    workload: Workload
    subject: dict[str, Any]
    processor_cache: int

    @property
    def prefill_operations(self) -> float:
        """Of reading all prompts."""
        return self.workload.batch * Operations(**self.subject["operations"]).prefill(self.workload.prompt)

    def step_bytes(self, r: Round) -> float:
        """Bytes that a decoding step reads: all weights, and each cache row in use, however many beams share it."""
        weights, work = float(self.subject["weight_bytes"]), self.workload
        if r.step_cache_bytes is not None:
            return weights + r.step_cache_bytes
        halfway, end = work.prompt + work.answer / 2, work.prompt + work.answer - 1
        return weights + (r.cache_bytes or 0) * halfway / end


@dataclass(frozen=True)
class Metric:
    """One column.

    Attributes:
        key: in CSV and comparisons, with its unit.
        title: in tables.
        value: of one process; None where the engine does not tell.
        more_is_better: None where it is neither.
        scale: what the value is divided by where people read it.
        digits: after the point there.
    """

    key: str
    title: str
    value: Value
    more_is_better: bool | None
    scale: float = 1.0
    digits: int = 1


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _rate(amount: float, seconds: float | None) -> float | None:
    return amount / seconds if seconds else None


def _first_token(_: Context, r: Round) -> float | None:
    if not r.encode:  # an engine that is given tokens
        return _median(r.prefill)
    return statistics.median(e + p for e, p in zip(r.encode, r.prefill, strict=True))


def _percentile(share: float) -> Value:
    return lambda _, r: float(np.percentile(r.steps, share)) if r.steps else None


def _read_rate(c: Context, r: Round) -> float | None:
    return _rate(c.step_bytes(r), _median(r.decode))


def _memory_rate(c: Context, r: Round) -> float | None:
    in_memory = c.step_bytes(r) > c.processor_cache
    return statistics.fmean(r.bandwidth) if r.bandwidth and in_memory else None


def _read_share(c: Context, r: Round) -> float | None:
    rate, limit = _read_rate(c, r), _memory_rate(c, r)
    return rate / limit if rate is not None and limit is not None else None


MS, GB, MB, PERCENT = 1e-3, 1e9, 1e6, 1e-2
METRICS = (
    Metric("encode_s", "encode, ms", lambda _, r: _median(r.encode), False, MS, 2),
    Metric("first_token_s", "first token, ms", _first_token, False, MS),
    Metric("prefill_s", "without encoding, ms", lambda _, r: _median(r.prefill), False, MS),
    Metric(
        "prefill_tokens_per_s",
        "prefill, tokens/s",
        lambda c, r: _rate(c.workload.batch * c.workload.prompt, _median(r.prefill)),
        True,
    ),
    Metric("prefill_flop_per_s", "GFLOP/s", lambda c, r: _rate(c.prefill_operations, _median(r.prefill)), True, 1e9, 0),
    Metric("decode_tokens_per_s", "decode, tokens/s", lambda c, r: _rate(c.workload.batch, _median(r.decode)), True),
    Metric("step_p50_s", "step p50, ms", _percentile(50), False, MS, 2),
    Metric("step_p90_s", "p90", _percentile(90), False, MS, 2),
    Metric("step_p99_s", "p99", _percentile(99), False, MS, 2),
    Metric("read_bytes_per_s", "GB/s", _read_rate, True, GB),
    Metric("memory_bytes_per_s", "memory's, GB/s", _memory_rate, None, GB),
    Metric("read_share", "share, %", _read_share, True, PERCENT, 0),
    Metric("load_s", "load, s", lambda _, r: r.load, False, 1, 2),
    Metric("load_to_first_token_s", "to first token, s", lambda _, r: r.cold, False, 1, 2),
    Metric("peak_resident_bytes", "peak memory, MB", lambda _, r: r.peak_resident, False, MB, 0),
    Metric("peak_anonymous_bytes", "of its own, MB", lambda _, r: r.peak_anonymous, False, MB, 0),
    Metric("peak_file_bytes", "of files, MB", lambda _, r: r.peak_file, None, MB, 0),
    Metric("cache_bytes", "cache, MB", lambda _, r: r.cache_bytes, False, MB),
    Metric("file_bytes", "files, MB", lambda c, _: c.subject["file_bytes"], False, MB),
)
BY_KEY = {metric.key: metric for metric in METRICS}


@dataclass(frozen=True)
class Summary:
    """A metric over all processes of a cell.

    Attributes:
        median: over processes.
        values: of each.
    """

    median: float
    values: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Half the distance between the largest and the smallest value, as a share of the median."""
        return (max(self.values) - min(self.values)) / 2 / abs(self.median) if self.median else 0.0


def context(result: Result, cell: Cell) -> Context:
    """What the metrics of a cell need."""
    processor_cache = result.about["machine"].get("processor_cache_bytes", 0)
    return Context(cell.workload, result.subjects[cell.subject], processor_cache)


def summarize(result: Result, cell: Cell) -> dict[str, Summary]:
    """All metrics that the cell has, by key."""
    about = context(result, cell)
    found: dict[str, Summary] = {}
    for metric in METRICS:
        values = [value for r in cell.rounds if (value := metric.value(about, r)) is not None]
        if values:
            found[metric.key] = Summary(statistics.median(values), tuple(values))
    return found
