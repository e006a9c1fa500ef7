"""Thousands of generations in one process: resident memory stays flat, and every cache row comes back.

Run ``python -m cpmbee.bench.soak``. Fails when memory grows by more than the limit.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from cpmbee import Engine
from cpmbee.bench.environment import write_result
from cpmbee.bench.models import exported_random_model, small_config

LIMIT_BYTES = 8 << 20
TEXT = "今天天气真好，我们去公园散步吧。The quick brown fox jumps over the lazy dog. "
EXAMPLES = [{"input": "北京是中国的首都", "<ans>": "Beijing is the capital of China"}]


def main() -> int:
    """Generate, print, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generations", type=int, default=2000)
    parser.add_argument("--warm-up", type=int, default=1000, help="generations before memory is looked at")
    parser.add_argument("--no-write", action="store_true", help="do not keep the result")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    samples: list[int] = []
    start = time.perf_counter()
    with exported_random_model(small_config(vocab_size=8000)) as folder:
        engine = Engine.from_pretrained(folder, num_threads=1, cache_tokens=4096)
        longest = {"input": (TEXT * 12)[:600], "<ans>": ""}
        engine.generate([longest, longest], EXAMPLES, beam_size=4, max_new_tokens=40)  # touches all it ever will
        for number in range(arguments.warm_up + arguments.generations):
            generate_one(engine, rng)
            usage = engine.cache_usage
            if usage.used:
                print(f"generation {number} left {usage.used} cache rows behind", file=sys.stderr)
                return 1
            if number >= arguments.warm_up and number % 50 == 0:
                samples.append(resident_bytes())
    half = len(samples) // 2
    growth = int(np.mean(samples[half:]) - np.mean(samples[:half]))
    payload = {
        "generations": arguments.generations,
        "seconds": round(time.perf_counter() - start, 1),
        "cache_rows_left": 0,
        "resident_mib": [round(sample / 2**20, 1) for sample in samples],
        "growth_bytes_second_half_over_first": growth,
        "limit_bytes": LIMIT_BYTES,
    }
    print({name: value for name, value in payload.items() if name != "resident_mib"})
    print("resident MiB:", payload["resident_mib"])
    if not arguments.no_write:
        write_result("soak", payload)
    return int(growth > LIMIT_BYTES)


def generate_one(engine: Engine, rng: np.random.Generator) -> None:
    """One call of a random kind and length."""
    request: dict[str, Any] = {"input": (TEXT * 12)[: int(rng.integers(1, 600))], "<ans>": {"a": "", "b": ""}}
    options: dict[str, Any] = {"max_new_tokens": int(rng.integers(1, 40))}
    kind = rng.integers(5)
    if kind == 0:
        options["beam_size"] = int(rng.integers(2, 5))
    elif kind == 1:
        options.update(temperature=1.5, top_p=0.9)
    elif kind == 2:
        for _ in engine.stream(request, **options):
            pass
        return
    elif kind == 3:
        engine.generate([request, {"input": "你好<option_0>", "<ans>": ""}], EXAMPLES, **options)
        return
    engine.generate(request, **options)


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
