"""Metrics, tables and pictures of invented samples."""

import csv
import io
from pathlib import Path

import pytest

from cpmbee.bench import plots
from cpmbee.bench.metrics import summarize
from cpmbee.bench.plan import Sweep, Workload
from cpmbee.bench.records import Cell, Result
from cpmbee.bench.report import csv_text, markdown
from tests.benchmarks.samples import ABOUT, SUBJECT, make_result, make_round


def test_metrics_by_hand() -> None:
    cell = Cell("model", Workload(100, 5, batch=2, threads=2), [make_round()])
    result = Result(dict(ABOUT), {2: [1e9]}, {"model": SUBJECT}, [cell])
    found = {key: summary.median for key, summary in summarize(result, cell).items()}
    assert found["encode_s"] == 0.002
    assert found["first_token_s"] == pytest.approx(0.502)
    assert found["prefill_s"] == 0.5
    assert found["prefill_tokens_per_s"] == 2 * 100 / 0.5
    assert found["prefill_flop_per_s"] == 2 * (2000 * 100 + 16 * 100**2 + 500) / 0.5
    assert found["decode_tokens_per_s"] == pytest.approx(2 / 0.01)
    assert found["step_p50_s"] == found["step_p99_s"] == 0.01
    read = 1_000_000 + 200_000 * (1 - 2.5 / 105)  # weights, and the cache as it is halfway through the answer
    assert found["read_bytes_per_s"] == pytest.approx(read / 0.01)
    assert found["read_share"] == pytest.approx(read / 0.01 / 1e9)
    assert found["file_bytes"] == 2_000_000


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
