"""Small supervised tasks over the vocabulary of `tests.model.factory`, as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

WORDS = ("今天", "天气", "北京", "上学", "真好", "abc", "xyz")


def choice_record(rng: np.random.Generator) -> dict[str, Any]:
    """Which option is the input?"""
    words = rng.permutation(WORDS)[:3].tolist()
    right = int(rng.integers(3))
    options = {f"<option_{i}>": word for i, word in enumerate(words)}
    return {"input": words[right], "options": options, "question": "", "<ans>": f"<option_{right}>"}


def copy_record(rng: np.random.Generator) -> dict[str, Any]:
    """Write the input."""
    return {"input": (word := str(rng.choice(WORDS))), "<ans>": word}


def choice_records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [choice_record(rng) for _ in range(count)]


def copy_records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [copy_record(rng) for _ in range(count)]


def write_records(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return file
