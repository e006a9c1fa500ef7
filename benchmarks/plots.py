"""Pictures of a result: each is drawn if the run has data for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from cpmbee.bench.metrics import BY_KEY, summarize
from cpmbee.bench.plan import Workload
from cpmbee.bench.records import Cell, Result

Point = tuple[float, float]

SIZE, DPI = (7.5, 4.5), 150
SAME = 1e-7  # a divergence that is rounding; drawn near 0
MARKERS = "osD^vPX*<>p"  # one more than there are colours, so that no two lines look alike
NAMES = {"prompt": "prompt", "threads": "threads", "batch": "batch", "beams": "beams", "answer": "answer"}
PICTURES = (
    *("tokens-per-second-by-threads.png", "decode-by-context.png", "memory-by-context.png"),
    *("latency.png", "speed-and-quality.png"),
)


def draw(result: Result, folder: Path) -> list[Path]:
    """Draw what can be drawn into ``folder``; returns the files."""
    pictures: list[Callable[[Result], Figure | None]] = [
        *(by_threads, decode_by_context, memory_by_context),
        *(latency, speed_and_quality),
    ]
    files = []
    with mpl.rc_context({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}):
        for name, picture in zip(PICTURES, pictures, strict=True):
            figure = picture(result)
            if figure is not None:
                figure.savefig(folder / name, dpi=DPI, bbox_inches="tight")
                files.append(folder / name)
    return files


def by_threads(result: Result) -> Figure | None:
    """Decoding and prefill rates against threads."""
    keys = ("decode_tokens_per_s", "prefill_tokens_per_s")
    return _lines(result, "threads", keys, "threads", [BY_KEY[key].title for key in keys])


def decode_by_context(result: Result) -> Figure | None:
    """Decoding rate against the length of the prompt."""
    return _lines(result, "prompt", ("decode_tokens_per_s",), "tokens of the prompt", ["decode, tokens/s"])


def memory_by_context(result: Result) -> Figure | None:
    """Peak memory and cache against the length of the prompt."""
    keys = ("peak_resident_bytes", "cache_bytes")
    return _lines(result, "prompt", keys, "tokens of the prompt", ["peak memory, MB", "cache in use, MB"])


def latency(result: Result) -> Figure | None:
    """Distribution of the time between tokens, for the longest prompt of each model."""
    chosen: dict[str, Cell] = {}
    for cell in result.cells:
        if any(r.steps for r in cell.rounds):
            known = chosen.get(cell.subject)
            if known is None or cell.workload.prompt > known.workload.prompt:
                chosen[cell.subject] = cell
    if not chosen:
        return None
    figure, (axes,) = _figure(1)
    for index, (label, cell) in enumerate(chosen.items()):
        steps = sorted(1e3 * step for r in cell.rounds for step in r.steps)
        shares = [100 * (i + 1) / len(steps) for i in range(len(steps))]
        axes.plot(steps, shares, label=label, linestyle=("-", "--", ":")[index // 10 % 3])
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_formatter("{x:g}")  # 30 and 40 rather than powers of ten
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 4, 5, 6, 8)))
    axes.xaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())
    axes.set_xlabel(f"time between two tokens, ms (prompt {_listed({c.workload.prompt for c in chosen.values()})})")
    axes.set_ylabel("share of tokens that came within it, %")
    _legend(axes)
    return figure


def _listed(prompts: set[int]) -> str:
    return ", ".join(map(str, sorted(prompts)))


def speed_and_quality(result: Result) -> Figure | None:
    """Decoding rate against KL divergence from fp32."""
    points: dict[str, Point] = {}
    prompts = set()
    for cell in result.cells:
        quality = result.quality.get(cell.subject)
        summary = summarize(result, cell).get("decode_tokens_per_s")
        if quality and summary and cell.subject not in points:
            points[cell.subject] = (float(quality["kl"]), summary.median)
            prompts.add(cell.workload.prompt)
    if len(points) < 2:
        return None
    figure, (axes,) = _figure(1)
    for index, (label, (kl, rate)) in enumerate(points.items()):
        axes.scatter([kl], [rate], marker=MARKERS[index % len(MARKERS)], s=45, label=label, zorder=3)
    axes.set_xscale("symlog", linthresh=SAME)
    axes.set_xlim(left=-SAME / 10)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("KL divergence from fp32, nats (less is better)")
    axes.set_ylabel(f"decode, tokens/s (prompt {_listed(prompts)})")
    _legend(axes)
    return figure


def _lines(result: Result, name: str, keys: Sequence[str], xlabel: str, ylabels: Sequence[str]) -> Figure | None:
    """One panel for each metric, one line for each model and each combination of the other settings."""
    panels = [_series(result, name, key) for key in keys]
    if not any(panels):
        return None
    figure, every = _figure(len(keys))
    for axes, series, ylabel in zip(every, panels, ylabels, strict=True):
        for index, (label, points) in enumerate(series.items()):
            xs, ys = zip(*sorted(points), strict=True)
            style = ("-", "--", ":")[index // 10 % 3]
            axes.plot(xs, ys, marker=MARKERS[index % len(MARKERS)], linestyle=style, label=label)
        ticks = sorted({x for points in series.values() for x, _ in points})
        if len(ticks) > 2 and ticks[-1] > 16 * ticks[0]:
            axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
    _legend(every[-1])
    return figure


def _series(result: Result, name: str, key: str) -> dict[str, list[Point]]:
    """Lines of at least two points: (value of ``name``, median of the metric)."""
    metric = BY_KEY[key]
    found: dict[tuple[str, Workload], list[Point]] = defaultdict(list)
    for cell in result.cells:
        summary = summarize(result, cell).get(key)
        if summary is not None:
            others = Workload(**{**asdict(cell.workload), name: 0})
            value = float(getattr(cell.workload, name))
            found[cell.subject, others].append((value, summary.median / metric.scale))
    found = {where: points for where, points in found.items() if len({x for x, _ in points}) > 1}
    return {_label(where, [work for _, work in found]): points for where, points in found.items()}


def _label(where: tuple[str, Workload], works: Sequence[Workload]) -> str:
    """The model, and of the other settings those that differ between lines."""
    subject, work = where
    differing = [name for name in NAMES if len({getattr(each, name) for each in works}) > 1]
    return ", ".join([subject, *(f"{NAMES[name]} {getattr(work, name)}" for name in differing)])


def _figure(panels: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(SIZE[0] * (1 if panels == 1 else 1.5), SIZE[1]), layout="constrained")
    every: Any = figure.subplots(1, panels, squeeze=False)
    return figure, list(every[0])


def _legend(axes: Axes) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
