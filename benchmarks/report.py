"""A result for people and spreadsheets: Markdown and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cpmbee.bench.metrics import BY_KEY, METRICS, Summary, summarize
from cpmbee.bench.profile_table import profile_markdown
from cpmbee.bench.records import Cell, Result

MEMORY = ("load_s", "load_to_first_token_s", *(metric.key for metric in METRICS if metric.key.endswith("_bytes")))
DERIVED = ("prefill_s",)  # what prefill's rate says already; in the sheet only
SPEED = tuple(metric.key for metric in METRICS if metric.key not in (*MEMORY, *DERIVED))
NOISY = ("prefill_tokens_per_s", "decode_tokens_per_s")  # shown with their spread
LARGE = 1000  # numbers from here on are shown without a fraction
QUALITY = {"kl": "KL, nats", "top1": "top-1, %", "accuracy": "right, %"}


def markdown(result: Result) -> str:
    """The whole report: settings, table, skipped, notes, profile."""
    constant, varying = _columns(result.cells)
    parts = [_heading(result, constant)]
    if result.cells:
        parts += [_table(result, varying, SPEED), _table(result, varying, MEMORY, tuple(QUALITY))]
    if result.skipped:
        parts.append("Not measured:\n\n" + "\n".join(f"- {label}: {reason}" for label, reason in result.skipped))
    if result.notes:
        notes = "\n".join(f"- {name}: {note}" for name, note in result.notes.items())
        parts.append(f"What the numbers are:\n\n{notes}")
    parts += [profile_markdown(label, profile) for label, profile in result.profile.items()]
    return "\n\n".join(parts) + "\n"


def csv_text(result: Result) -> str:
    """One line for each cell: what it is, and every metric's median and extremes over processes."""
    keys = [key for metric in METRICS for key in (metric.key, f"{metric.key}_low", f"{metric.key}_high")]
    header = ["subject", "engine", "precision", "cache", "parameters"]
    work = ["prompt", "answer", "batch", "beams", "threads", "device"]
    out = io.StringIO()
    writer = csv.DictWriter(out, [*header, *work, *keys, *QUALITY], restval="", lineterminator="\n")
    writer.writeheader()
    for cell in result.cells:
        about = result.subjects[cell.subject]
        row: dict[str, Any] = {"subject": cell.subject, **{name: about[name] for name in header[1:]}}
        row |= asdict(cell.workload)
        for key, summary in summarize(result, cell).items():
            row |= {key: summary.median, f"{key}_low": min(summary.values), f"{key}_high": max(summary.values)}
        quality = result.quality.get(cell.subject, {})
        row |= {name: value for name in QUALITY if (value := quality.get(name)) is not None}
        writer.writerow(row)
    return out.getvalue()


def _heading(result: Result, constant: Mapping[str, Any]) -> str:
    about = result.about
    machine = about["machine"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {', '.join(machine['vector_instructions']) or 'no vectors'}, "
        f"{machine.get('memory_gib', '?')} GiB; commit {about['commit']}; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items()),
        f"{_processes(result)}, {_count(about['repetitions'], 'repetition')} in each; ± is half the distance "
        "between the fastest and the slowest process",
    ]
    if constant:
        lines.append("all rows: " + ", ".join(f"{name} {value}" for name, value in constant.items()))
    lines += [_memory(threads, rates) for threads, rates in result.bandwidth().items()]
    if result.cells:
        lines.append(
            "GB/s are those of a decoding step: all weights as they are stored and the cache rows in use, read once "
            "in its mean time"
        )
        held = {"read_share" in summarize(result, cell) for cell in result.cells}
        if True in held:
            lines.append(
                "memory's GB/s are what as many threads could read just before and just after the same process, their "
                "mean; the share is taken process by process, and each column is the median over processes"
            )
        if False in held and (cache := machine.get("processor_cache_bytes")):
            lines.append(f"what fits the processor's cache ({cache / 1e6:.0f} MB) need not come from memory: no share")
        disturbed = max(r.disturbed for cell in result.cells for r in cell.rounds)
        lines.append(f"others took at most {disturbed:.0%} of the machine during a measurement")
    return "\n".join(f"- {line}" for line in lines)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _processes(result: Result) -> str:
    """How many processes stand behind a row."""
    about = result.about
    counts = sorted({len(cell.rounds) for cell in result.cells} or {about["rounds"]})
    if len(counts) == 1:
        return f"{counts[0]} process{'es' if counts[0] > 1 else ''} for each row"
    why = (
        f" (more than 2 where their rates were not within ±{settled:.0%})" if (settled := about.get("settled")) else ""
    )
    return f"{counts[0]} to {counts[-1]} processes for each row{why}"


def _memory(threads: int, rates: Sequence[float]) -> str:
    return (
        f"memory is read by {_count(threads, 'thread')} at {statistics.median(rates) / 1e9:.1f} GB/s "
        f"(median of {len(rates)} readings, {min(rates) / 1e9:.1f} to {max(rates) / 1e9:.1f})"
    )


def _columns(cells: Sequence[Cell]) -> tuple[dict[str, Any], list[str]]:
    """Of the workload: what is the same in all rows, and what is a column."""
    works = [asdict(cell.workload) for cell in cells]
    names = list(works[0]) if works else []
    constant = {name: works[0][name] for name in names if len({work[name] for work in works}) == 1}
    return constant, [name for name in names if name not in constant]


def _table(result: Result, varying: Sequence[str], shown: Sequence[str], quality: Sequence[str] = ()) -> str:
    summaries = [summarize(result, cell) for cell in result.cells]
    keys = [key for key in shown if any(key in summary for summary in summaries)]
    names = [name for name in quality if any(each.get(name) is not None for each in result.quality.values())]
    caches = ["cache type"] if len({result.subjects[cell.subject]["cache"] for cell in result.cells}) > 1 else []
    titles = [
        "model",
        "weights",
        *caches,
        *varying,
        *(BY_KEY[key].title for key in keys),
        *(QUALITY[name] for name in names),
    ]
    lines = ["| " + " | ".join(titles) + " |", "|---|---" + "|---:" * (len(titles) - 2) + "|"]
    for cell, summary in zip(result.cells, summaries, strict=True):
        work, about = asdict(cell.workload), result.subjects[cell.subject]
        columns = [cell.subject, about["precision"], *([about["cache"]] if caches else [])]
        columns += [*(str(work[name]) for name in varying)]
        columns += [_shown(key, summary.get(key)) for key in keys]
        columns += [_quality(name, result.quality.get(cell.subject, {}).get(name)) for name in names]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines)


def _shown(key: str, summary: Summary | None) -> str:
    if summary is None:
        return ""
    metric = BY_KEY[key]
    value = summary.median / metric.scale
    text = f"{value:,.{0 if abs(value) >= LARGE else metric.digits}f}"
    if key in NOISY and len(summary.values) > 1:
        text += f" ±{100 * summary.spread:.1f} %"
    return text


def _quality(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1e}" if name == "kl" else f"{100 * value:.2f}"
