"""Results made of invented samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from cpmbee.bench.plan import Workload
from cpmbee.bench.records import Cell, Result, Round

SUBJECT: dict[str, Any] = {
    "label": "model",
    "model": "model",
    "engine": "cpmbee",
    "path": "model",
    "precision": "int4",
    "cache": "fp32",
    "parameters": 1000,
    "file_bytes": 2_000_000,
    "weight_bytes": 1_000_000,
    "loaded_bytes": 1_000_000,
    "row_bytes": 1000,
    "pair_bytes": 2,
    "operations": {"token": 2000.0, "pair": 16.0, "head": 500.0},
}
ABOUT: dict[str, Any] = {
    "command": "cpmbee bench model",
    "commit": "0123456789ab",
    "machine": {"cpu": "a processor", "cores": 2, "vector_instructions": ["avx2"], "memory_gib": 8.0},
    "versions": {"python": "3.11", "numpy": "2.0"},
    "rounds": 3,
    "repetitions": 3,
}


def make_round(step: float = 0.01, prefill: float = 0.5, resident: int = 300_000_000, answer: int = 5) -> Round:
    steps = [step] * (answer - 1)
    return Round(
        load=0.2,
        cold=0.8,
        encode=[0.001, 0.002, 0.003],
        prefill=[prefill, prefill, 2 * prefill],
        decode=[step, step],
        steps=steps * 2,
        cache_bytes=200_000,
        peak_resident=resident,
        peak_anonymous=100_000_000,
        peak_file=200_000_000,
        bandwidth=[38e9, 42e9],
    )


def make_result(
    seed: int = 0,
    *,
    slowdown: float = 1.0,
    noise: float = 0.01,
    rounds: int = 3,
    prompts: tuple[int, ...] = (128, 512),
    threads: tuple[int, ...] = (2,),
) -> Result:
    """Processes whose times scatter by ``noise``, all of them ``slowdown`` times as long as a model takes."""
    rng = np.random.default_rng(seed)
    result = Result(dict(ABOUT), {"model": SUBJECT})
    for prompt in prompts:
        for count in threads:
            cell = Cell("model", Workload(prompt, 5, threads=count))
            for _ in range(rounds):
                factor = slowdown * float(np.exp(noise * rng.standard_normal()))
                cell.rounds.append(make_round(0.01 * factor / count, 0.004 * prompt * factor / count))
            result.cells.append(cell)
    return result
