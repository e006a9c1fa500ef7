"""Every recorded generation of the original, through the reference, the native kernels and the function bodies."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cpmbee
from cpmbee.export.reference import ReferenceBackend
from cpmbee.model import load_model, read_lora
from tests.golden import DATA, GOLDEN, read_jsonl, requires_golden

CHECKPOINTS = ("tiny", "tiny-pruned", "tiny-eos", "tiny-ext")
SWITCHED_OFF = pytest.mark.skipif(os.environ.get("CPMBEE_NATIVE") == "0", reason="CPMBEE_NATIVE=0")
WAYS = ("reference", pytest.param("native", marks=SWITCHED_OFF), "function")
LORA = "lora-delta.pt"

pytestmark = requires_golden


def make_engine(way: str, name: str, exported: Callable[..., Path], lora: str | None = None) -> cpmbee.Engine:
    if way == "reference":
        torch.set_num_threads(1)
        delta = None if lora is None else read_lora(GOLDEN / name / lora, alpha=16)
        tokenizer = cpmbee.Tokenizer.from_file(DATA / "bee_vocab.txt")
        return cpmbee.Engine(ReferenceBackend(load_model(GOLDEN / name, lora=delta)), tokenizer)
    engine = cpmbee.Engine.from_pretrained(exported(name, lora), num_threads=1, native=way == "native")
    assert (engine.native_ops["BucketedAttention"] == "function") == (way == "function")
    return engine


def check(engine: cpmbee.Engine, case: dict[str, Any]) -> None:
    options = dict(case["params"])
    options["max_new_tokens"] = options.pop("max_length") + 2
    results = engine.generate(case["data"], **options)
    assert [result.answer for result in results] == case["answers"], f"{options}: {case['data']}"
    usage = engine.cache_usage
    assert (usage.used, usage.kept) == (0, 0)


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("way", WAYS)
def test_recorded_answers(way: str, name: str, exported_golden: Callable[..., Path]) -> None:
    engine = make_engine(way, name, exported_golden)
    cases = read_jsonl(GOLDEN / name / "generate.jsonl")
    assert len(cases) == 33
    for case in cases:
        check(engine, case)


@pytest.mark.parametrize("way", WAYS)
def test_recorded_answers_with_lora(way: str, exported_golden: Callable[..., Path]) -> None:
    engine = make_engine(way, "tiny", exported_golden, LORA)
    for case in read_jsonl(GOLDEN / "tiny" / "generate_lora.jsonl"):
        check(engine, case)
