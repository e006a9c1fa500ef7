"""Metrics, tables and pictures of invented samples."""

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import imread

from cpmbee.bench import plots
from cpmbee.bench.metrics import summarize
from cpmbee.bench.plan import Sweep, Workload
from cpmbee.bench.records import Cell, Result, Round
from cpmbee.bench.report import csv_text, markdown
from tests.benchmarks.samples import ABOUT, SUBJECT, make_result, make_round

WORK = Workload(100, 5, batch=2, threads=2)


def result_of(*rounds: Round, workload: Workload = WORK, cache: int = 0) -> Result:
    about = {**ABOUT, "machine": {**ABOUT["machine"], "processor_cache_bytes": cache}}
    return Result(about, {"model": SUBJECT}, [Cell("model", workload, list(rounds))])


def test_metrics_by_hand() -> None:
    result = result_of(make_round())
    (cell,) = result.cells
    found = {key: summary.median for key, summary in summarize(result, cell).items()}
    assert found["encode_s"] == 0.002
    assert found["first_token_s"] == pytest.approx(0.502)
    assert found["prefill_s"] == 0.5
    assert found["prefill_tokens_per_s"] == 2 * 100 / 0.5
    assert found["prefill_flop_per_s"] == 2 * (2000 * 100 + 16 * 100**2 + 500) / 0.5
    assert found["decode_tokens_per_s"] == pytest.approx(2 / 0.01)
    assert found["step_p50_s"] == found["step_p99_s"] == 0.01
    read = 1_000_000 + 200_000 * 102.5 / 104  # weights, and the cache as it is halfway through the answer
    assert found["read_bytes_per_s"] == pytest.approx(read / 0.01)
    assert found["memory_bytes_per_s"] == 40e9
    assert found["read_share"] == pytest.approx(read / 0.01 / 40e9)
    assert found["file_bytes"] == 2_000_000


def test_each_process_is_held_against_the_memory_beside_it() -> None:
    fast = replace(make_round(step=0.01), bandwidth=[90e9, 70e9])
    slow = replace(make_round(step=0.02), bandwidth=[30e9, 50e9])
    result = result_of(fast, slow, replace(slow, bandwidth=[60e9]))
    found = summarize(result, result.cells[0])
    assert found["read_share"].values[0] == pytest.approx(found["read_share"].values[1])
    assert found["memory_bytes_per_s"].values == (80e9, 40e9, 60e9)
    text = markdown(result)
    assert "memory is read by 2 threads at 60.0 GB/s (median of 5 readings, 30.0 to 90.0)" in text
    assert "share, %" in text


def test_beams_read_what_they_share_once() -> None:
    shared = replace(make_round(), step_cache_bytes=150_000.0)
    result = result_of(shared, workload=Workload(100, 5, beams=3, threads=2))
    assert summarize(result, result.cells[0])["read_bytes_per_s"].median == pytest.approx(1_150_000 / 0.01)


def test_what_fits_the_processor_is_not_held_against_memory() -> None:
    result = result_of(make_round(), cache=32 << 20)
    assert "read_share" not in summarize(result, result.cells[0])
    text = markdown(result)
    assert "share, %" not in text
    assert "what fits the processor's cache (34 MB)" in text
    assert "just before" not in text


def test_nothing_is_said_of_measurements_where_there_are_none() -> None:
    result = result_of()
    result.cells.clear()
    text = markdown(result)
    assert "others took" not in text
    assert "GB/s" not in text


def test_how_many_processes_is_said() -> None:
    result = make_result(0)
    assert "- 3 processes for each row, 3 repetitions" in markdown(result)
    result.about |= {"settled": 0.03}
    result.cells[0].rounds.pop()
    assert "- 2 to 3 processes for each row (more than 2 where their rates were not within ±3%), 3" in markdown(result)


def test_sweep_is_every_combination() -> None:
    works = list(Sweep((128, 512), (32,), (1, 8), (1,), (1, 2), ("cpu",)).workloads())
    assert len(works) == len(set(works)) == 8
    assert works[0] == Workload(128, 32, 1, 1, 1, "cpu")


def test_table_shows_what_varies_and_says_what_does_not() -> None:
    result = make_result(0)
    result.skipped.append(("ctranslate2", "ctranslate2 is not installed"))
    result.notes["torch"] = "the reference"
    result.quality["model"] = {"kl": 0.001, "top1": 0.99, "accuracy": None}
    text = markdown(result)
    assert "| model | weights | prompt |" in text
    assert "answer 5" in text
    assert "- ctranslate2: ctranslate2 is not installed" in text
    assert "- torch: the reference" in text
    assert "1.0e-03" in text
    assert "right, %" not in text
    assert "±" in text


def test_sheet_has_medians_and_extremes() -> None:
    result = make_result(0)
    rows = list(csv.DictReader(io.StringIO(csv_text(result))))
    assert [row["prompt"] for row in rows] == ["128", "512"]
    for row in rows:
        low, median, high = (float(row[f"decode_tokens_per_s{end}"]) for end in ("_low", "", "_high"))
        assert low < median < high


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures as they are saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def savefig(self: Figure, *arguments: Any, **options: Any) -> None:
        save(self, *arguments, **options)
        saved.append(self)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def title(figure: Figure) -> str:
    return figure.get_suptitle()


def test_titles_say_what_was_measured_where(tmp_path: Path, figures: list[Figure]) -> None:
    result = make_result(0, threads=(1, 2), prompts=(128,))
    plots.draw(result, tmp_path)
    for figure in figures:
        for text in ("model (int4)", "a processor, 2 cores", "prompt 128", "batch 1"):
            assert text in title(figure)
    assert title(figures[0]).startswith("Decoding and prefill by threads\n")
    assert "threads 1" not in title(figures[0])  # they are along the axis
    assert "median of 3 processes, bars from the least to the largest" in title(figures[0])
    plots.draw(make_result(0, prompts=(128, 512), rounds=1), tmp_path)
    assert "threads 2" in title(figures[-1])
    assert any("one process for each point" in title(figure) for figure in figures)


def test_precision_is_said_where_a_label_does_not(tmp_path: Path, figures: list[Figure]) -> None:
    result = make_result(0)
    result.subjects["model-int4"] = {**SUBJECT, "label": "model-int4"}
    result.cells += [Cell("model-int4", cell.workload, cell.rounds) for cell in result.cells]
    plots.draw(result, tmp_path)
    for figure in figures:
        labels = figure.axes[-1].get_legend_handles_labels()[1]
        assert labels == ["model (int4)", "model-int4"]


def test_bars_reach_from_the_least_to_the_largest_process(tmp_path: Path, figures: list[Figure]) -> None:
    result = make_result(0, noise=0.2)
    plots.draw(result, tmp_path)
    axes = figures[0].axes[0]
    (bars,) = axes.containers
    assert isinstance(bars, ErrorbarContainer)
    ends = [segment[:, 1].tolist() for segment in bars[2][0].get_segments()]
    for end, cell in zip(ends, result.cells, strict=True):
        values = summarize(result, cell)["decode_tokens_per_s"].values
        assert end == pytest.approx([min(values), max(values)])
    low, high = axes.get_ylim()
    assert low == 0
    assert high >= max(map(max, ends))


def test_nothing_is_outside_of_a_picture_or_on_top_of_something_else(tmp_path: Path, figures: list[Figure]) -> None:
    result = make_result(0, threads=(1, 2))
    for number in range(20):
        label = f"a model with a long name, number {number}"
        result.subjects[label] = {**SUBJECT, "label": label, "model": label}
        result.cells += [Cell(label, cell.workload, cell.rounds) for cell in result.cells[:4]]
        result.quality[label] = {"kl": number * 1e-7}
    files = plots.draw(result, tmp_path)
    assert len(files) == 5
    for file, figure in zip(files, figures, strict=True):
        pixels = imread(file)[:, :, :3]
        assert all((edge == 1).all() for edge in (pixels[:5], pixels[-5:], pixels[:, :5], pixels[:, -5:]))  # white
        heading = figure._suptitle.get_window_extent()  # type: ignore[attr-defined]
        legend = figure.axes[-1].get_legend().get_window_extent()
        assert not heading.overlaps(legend)
        assert not any(heading.overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_pictures_are_drawn_only_where_there_is_data(tmp_path: Path) -> None:
    names = {path.name for path in plots.draw(make_result(0, prompts=(128,)), tmp_path)}
    assert names == {"latency.png"}
    result = make_result(0, threads=(1, 2))
    result.subjects["other"] = {**SUBJECT, "label": "other"}
    result.cells += [Cell("other", cell.workload, cell.rounds) for cell in result.cells]
    result.quality = {"model": {"kl": 0.0}, "other": {"kl": 0.01}}
    drawn = plots.draw(result, tmp_path)
    assert {path.name for path in drawn} == {
        "tokens-per-second-by-threads.png",
        "decode-by-context.png",
        "memory-by-context.png",
        "latency.png",
        "speed-and-quality.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
