"""Figures of the README and the model card are those of the recorded results, and those of each other."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARD = (ROOT / "model" / "demo" / "README.md").read_text(encoding="utf-8")
FLAT = " ".join(README.split())
LABELS = {
    "fp16": "fp16, cache in fp16",
    "int8": "int8, cache in fp16",
    "int4": "int4 (head int8), cache in fp16",
}


def recorded(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def row(label: str) -> list[str]:
    """The cells of the README's row that begins like this, without emphasis."""
    (line,) = re.findall(rf"^\| {re.escape(label)} \|(.*)\|$", README, re.MULTILINE)
    return [cell.strip().strip("*") for cell in line.split("|")]


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def test_text() -> None:
    found, overhead = recorded("text"), recorded("decode_overhead")
    fast, plain = found["compiled"], found["plain"]
    text, requests = "tokenizer, one text (MB/s)", "encode_prompt (requests/s)"
    assert row("tokenizer, Chinese text") == [f"{fast[text]:.0f} MB/s", f"{plain[text]:.1f} MB/s"]
    assert row("encoding a request with four options") == [
        f"{round(side[requests], -3):,.0f} requests/s" for side in (fast, plain)
    ]
    label = f"engine's own share of a decode step, vocabulary {overhead['vocabulary']:,}"
    assert row(label) == [f"{overhead['outside_run_microseconds']['median']:.0f} µs", ""]


def test_a_long_prompt() -> None:
    found = recorded("long_prompt")
    native, bodies = found["native"], found["function"]
    assert row("time") == [f"{native['seconds']:.2f} s", f"{bodies['seconds']:.1f} s"]
    assert row("memory at its peak, above the loaded model") == [
        f"{side['peak_over_loaded_mib']:,.0f} MiB" for side in (native, bodies)
    ]


FORMS = {  # of the columns of a sheet: factor, format
    "prefill_tokens_per_s": (1, "{:.0f}"),
    "read_share": (100, "{:.0f} %"),
    "step_p50_s": (1000, "{:.1f}"),
    "load_to_first_token_s": (1, "{:.1f}"),
    "peak_anonymous_bytes": (1e-6, "{:,.0f}"),
}
ENGINES = ("cpmbee", "matmulnbits", "dynamic-quantize", "llama.cpp", "ctranslate2", "onnxruntime-genai")


@pytest.mark.parametrize(
    ("label", "sheet", "chosen", "column"),
    [
        ("int4, prompt of 512, tokens/s", "2b", {"prompt": "512"}, "prefill_tokens_per_s"),
        ("int8, prompt of 512, tokens/s", "2b", {"prompt": "512"}, "prefill_tokens_per_s"),
        ("int4, decoding behind 512, share of the memory's bandwidth", "2b", {"prompt": "512"}, "read_share"),
        ("int8, decoding behind 512, share of the memory's bandwidth", "2b", {"prompt": "512"}, "read_share"),
        ("int4, 3 beams: a step, ms", "2b-beams", {"beams": "3"}, "step_p50_s"),
        ("int4, 8 requests together: a step, ms", "2b-batch", {"batch": "8"}, "step_p50_s"),
        ("int4, load to first token behind 128, s", "2b", {"prompt": "128"}, "load_to_first_token_s"),
        ("int4, memory of its own behind 128, MB", "2b", {"prompt": "128"}, "peak_anonymous_bytes"),
    ],
)
def test_the_2b_shape(label: str, sheet: str, chosen: dict[str, str], column: str) -> None:
    with (RESULTS / "table" / f"{sheet}.csv").open(encoding="utf-8") as file:
        rows = [one for one in csv.DictReader(file) if one["precision"] == label[:4]]
    found = {one["engine"]: one[column] for one in rows if chosen.items() <= one.items()}
    factor, form = FORMS[column]
    assert row(label) == [form.format(float(found[name]) * factor) if found.get(name) else "" for name in ENGINES]


def test_10b() -> None:
    found = recorded("export_10b_int4")
    gigabytes = found["peak_anonymous_bytes"] / 1e9
    assert f"in {found['seconds']:.0f} s with {gigabytes:.1f} GB of memory of its own" in FLAT


def test_training_of_the_reference() -> None:
    found = recorded("ccpm")["evaluation"]
    shares = {name: percent(result["choice_accuracy"]) for name, result in found.items()}
    assert shares["PyTorch"] == shares["engine, fp32"]
    assert f"reaches {shares['PyTorch']} from nothing" in FLAT
    assert f"{shares['engine, int8']} in int8" in FLAT


def test_what_a_precision_costs() -> None:
    found = recorded("quality")
    assert f"asked {found['requests']} of the requests that come with it" in FLAT
    chosen = {"head_bits": 8, "block_size": 64, "method": "search", "calibrated": False}
    rows = {one["precision"]: one for one in found["rows"] if chosen.items() <= one.items()}
    for precision, label in LABELS.items():
        one = rows[precision]
        size, divergence, agreement, right = row(label)
        assert size == f"{one['data_bytes'] / 1e6:.1f} MB"
        assert float(divergence) == float(f"{one['kl']:.{len(divergence.partition('e')[0].partition('.')[2])}e}")
        assert agreement == percent(one["top1"])
        assert right == percent(one["accuracy"])
        whole = f"{2 * rows['fp16']['data_bytes'] / 1e6:.1f} MB"
        assert row("fp32") == [whole, "0", "100.0 %", percent(one["reference_accuracy"])]


def test_the_readme_says_of_the_bundled_model_what_its_card_says() -> None:
    stated = dict(re.findall(r"^\| ([^|]+) \| by \w+ \| (\d+\.\d %) \(\d+ of \d+\) \|", CARD, re.MULTILINE))
    verse, reading, _, digits, numerals = stated.values()
    assert next(iter(stated)).startswith("simplified to traditional")
    numbers = f"{digits.removesuffix(' %')} to {numerals} of the numerals"
    assert f"answers {verse} of the lines of verse, {reading} of the readings and {numbers}" in FLAT
    assert f"fp16, {row(LABELS['fp16'])[0]} |" in CARD


def test_the_model_card_says_how_the_model_was_trained() -> None:
    run = recorded("demo_training")["run"]
    assert f"{run['steps']:,} steps" in CARD
    assert f"{run['tokens'] / 1e6:.1f} million tokens" in CARD
    assert f"| {run['seconds'] / 60:.0f} minutes on one thread" in CARD
    majority = recorded("demo_training")["majority"]
    assert f"{percent(majority['traditional'])}: characters' most frequent forms" in CARD
    assert f"{percent(majority['reading'])}: its most frequent reading" in CARD
