"""Pictures of a result: each is drawn if the run has data for it.

A point is the median over the processes of a cell, its bar reaches from their least to their largest value, and the
title says what was measured where.
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from cpmbee.bench.metrics import BY_KEY, summarize
from cpmbee.bench.plan import Workload
from cpmbee.bench.records import Cell, Result

SIZE, DPI = (7.5, 4.5), 150
INCH_LETTERS = 12  # of a title
LINE, AXIS = 0.2, 0.7  # inches: of a line of the title or the legend, and of what is below the panels
MOST_MODELS = 4  # that a title names
SAME = 1e-7  # a divergence that is rounding; drawn near 0
MARKERS = "osD^vPX*<>p"  # one more than there are colours, so that no two lines look alike
NAMES = {"prompt": "prompt", "threads": "threads", "batch": "batch", "beams": "beams", "answer": "answer"}
PICTURES = (
    *("tokens-per-second-by-threads.png", "decode-by-context.png", "memory-by-context.png"),
    *("latency.png", "speed-and-quality.png"),
)


class Point(NamedTuple):
    """One median, and the processes it is of."""

    x: float
    y: float
    low: float
    high: float


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
                figure.savefig(folder / name, bbox_inches="tight", pad_inches=0.2)
                files.append(folder / name)
    return files


def by_threads(result: Result) -> Figure | None:
    """Decoding and prefill rates against threads."""
    keys = ("decode_tokens_per_s", "prefill_tokens_per_s")
    ylabels = [BY_KEY[key].title for key in keys]
    return _lines(result, "threads", keys, "Decoding and prefill by threads", "threads", ylabels)


def decode_by_context(result: Result) -> Figure | None:
    """Decoding rate against the length of the prompt."""
    keys, ylabels = ("decode_tokens_per_s",), ["decode, tokens/s"]
    return _lines(result, "prompt", keys, "Decoding by length of the prompt", "tokens of the prompt", ylabels)


def memory_by_context(result: Result) -> Figure | None:
    """Peak memory and cache against the length of the prompt."""
    keys, ylabels = ("peak_resident_bytes", "cache_bytes"), ["peak memory, MB", "cache in use, MB"]
    return _lines(result, "prompt", keys, "Memory by length of the prompt", "tokens of the prompt", ylabels)


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
    figure, (axes,) = _figure(1, "Time between tokens", result, chosen.values(), "steps of all processes")
    for index, (subject, cell) in enumerate(chosen.items()):
        steps = sorted(1e3 * step for r in cell.rounds for step in r.steps)
        shares = [100 * (i + 1) / len(steps) for i in range(len(steps))]
        axes.plot(steps, shares, label=_named(result, subject), linestyle=("-", "--", ":")[index // 10 % 3])
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_formatter("{x:g}")  # 30 and 40 rather than powers of ten
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 4, 5, 6, 8)))
    axes.xaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())
    axes.set_xlabel("time between two tokens, ms")
    axes.set_ylabel("share of tokens that came within it, %")
    _legend(figure, axes)
    return figure


def speed_and_quality(result: Result) -> Figure | None:
    """Decoding rate against KL divergence from fp32."""
    points: dict[str, Point] = {}
    cells = []
    for cell in result.cells:
        quality = result.quality.get(cell.subject)
        summary = summarize(result, cell).get("decode_tokens_per_s")
        if quality and summary and cell.subject not in points:
            points[cell.subject] = Point(float(quality["kl"]), summary.median, min(summary.values), max(summary.values))
            cells.append(cell)
    if len(points) < 2:
        return None
    figure, (axes,) = _figure(1, "Speed and quality", result, cells)
    for index, (subject, point) in enumerate(points.items()):
        _draw(axes, [point], index, _named(result, subject), line="none")
    axes.set_xscale("symlog", linthresh=SAME)
    axes.set_xlim(left=-SAME / 3, right=2 * max(SAME, *(point.x for point in points.values())))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("KL divergence from fp32, nats (less is better)")
    axes.set_ylabel("decode, tokens/s")
    _legend(figure, axes)
    return figure


def _lines(
    result: Result, name: str, keys: Sequence[str], title: str, xlabel: str, ylabels: Sequence[str]
) -> Figure | None:
    """One panel for each metric, one line for each model and each combination of the other settings."""
    panels = [_series(result, name, key) for key in keys]
    if not any(panels):
        return None
    drawn = {subject for series in panels for subject, _ in series}
    figure, every = _figure(
        len(keys), title, result, [cell for cell in result.cells if cell.subject in drawn], varying=name
    )
    for axes, series, ylabel in zip(every, panels, ylabels, strict=True):
        works = [work for _, work in series]
        for index, ((subject, work), points) in enumerate(series.items()):
            label = _label(_named(result, subject), work, works)
            _draw(axes, sorted(points), index, label, line=("-", "--", ":")[index // 10 % 3])
        ticks = sorted({point.x for points in series.values() for point in points})
        if len(ticks) > 2 and ticks[-1] > 16 * ticks[0]:
            axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
    _legend(figure, every[-1])
    return figure


def _draw(axes: Axes, points: Sequence[Point], index: int, label: str, line: str) -> None:
    """Points with their bars, joined by a line or not."""
    bars = [[point.y - point.low for point in points], [point.high - point.y for point in points]]
    axes.errorbar(
        [point.x for point in points],
        [point.y for point in points],
        yerr=bars,
        capsize=3,
        marker=MARKERS[index % len(MARKERS)],
        linestyle=line,
        label=label,
    )


def _series(result: Result, name: str, key: str) -> dict[tuple[str, Workload], list[Point]]:
    """Lines of at least two points, by subject and all of the workload but ``name``: the metric against ``name``."""
    metric = BY_KEY[key]
    found: dict[tuple[str, Workload], list[Point]] = defaultdict(list)
    for cell in result.cells:
        summary = summarize(result, cell).get(key)
        if summary is not None:
            others = Workload(**{**asdict(cell.workload), name: 0})
            values = (summary.median, min(summary.values), max(summary.values))
            point = Point(float(getattr(cell.workload, name)), *(value / metric.scale for value in values))
            found[cell.subject, others].append(point)
    return {where: points for where, points in found.items() if len({point.x for point in points}) > 1}


def _label(subject: str, work: Workload, works: Sequence[Workload]) -> str:
    """The model, and of the other settings those that differ between lines."""
    differing = [name for name in NAMES if len({getattr(each, name) for each in works}) > 1]
    return ", ".join([subject, *(f"{NAMES[name]} {getattr(work, name)}" for name in differing)])


def _named(result: Result, subject: str) -> str:
    """A subject's label, with the precision of its weights where the label does not say it."""
    precision = result.subjects[subject]["precision"]
    return subject if precision in subject else f"{subject} ({precision})"


def _figure(
    panels: int, title: str, result: Result, cells: Iterable[Cell], what: str = "", varying: str = ""
) -> tuple[Figure, list[Axes]]:
    """An empty figure whose title says what is measured, of which models, where and how.

    Args:
        panels: beside one another.
        title: what is drawn.
        result: the run.
        cells: that are drawn.
        what: a point is; medians of processes unless given.
        varying: the setting along the axis, which the title leaves out.
    """
    cells = list(cells)
    width = SIZE[0] * (1 if panels == 1 else 1.5)
    figure = Figure(figsize=(width, SIZE[1]), dpi=DPI, layout="constrained")
    every: Any = figure.subplots(1, panels, squeeze=False)
    lines = [title, _models(result, cells), _circumstances(result, cells, varying), what or _processes(cells)]
    figure.suptitle("\n".join(textwrap.fill(line, round(width * INCH_LETTERS)) for line in lines), fontsize="medium")
    return figure, list(every[0])


def _models(result: Result, cells: Sequence[Cell]) -> str:
    """The models, and the precisions of their weights."""
    subjects = [result.subjects[cell.subject] for cell in cells]
    models, precisions = (list(dict.fromkeys(each[name] for each in subjects)) for name in ("model", "precision"))
    more = f" and {len(models) - MOST_MODELS} more" if len(models) > MOST_MODELS else ""
    return f"{', '.join(models[:MOST_MODELS])}{more} ({', '.join(precisions)})"


def _circumstances(result: Result, cells: Sequence[Cell], varying: str) -> str:
    """The processor, and the settings that all cells share."""
    machine = result.about["machine"]
    works = [asdict(cell.workload) for cell in cells]
    shared = [
        f"{NAMES[name]} {works[0][name]}"
        for name in NAMES
        if name != varying and len({work[name] for work in works}) == 1
    ]
    return f"{machine['cpu']}, {machine['cores']} cores; {', '.join(shared)}"


def _processes(cells: Sequence[Cell]) -> str:
    counts = sorted({len(cell.rounds) for cell in cells})
    if counts == [1]:
        return "one process for each point"
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"median of {number} processes, bars from the least to the largest of them"


def _legend(figure: Figure, axes: Axes) -> None:
    """Beside the panels, which become as high as it is."""
    lines = len(axes.get_legend_handles_labels()[1]) + len(figure.get_suptitle().splitlines())
    figure.set_figheight(max(SIZE[1], AXIS + LINE * lines))
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
