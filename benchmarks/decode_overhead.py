"""What the engine adds to ONNX Runtime's time in a greedy decode step: choosing the token and its score included.

Run ``python -m cpmbee.bench.decode_overhead``.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from cpmbee import Engine
from cpmbee.bench.environment import write_result
from cpmbee.bench.models import exported_random_model, small_config
from cpmbee.session import OrtRunner

LIMIT_MICROSECONDS = 100
WARM_UP_STEPS = 5


def main() -> None:
    """Measure, print, and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="decode steps of each generation")
    parser.add_argument("--rounds", type=int, default=10, help="generations")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime")
    parser.add_argument("--no-write", action="store_true", help="do not keep the result")
    arguments = parser.parse_args()
    config = small_config()
    with exported_random_model(config) as folder:
        outside, inside = measure(Engine.from_pretrained(folder, num_threads=arguments.threads), arguments)
    payload = {
        "vocabulary": config.vocab_size,
        "prompt_characters": len(PROMPT),
        "steps": len(outside),
        "threads": arguments.threads,
        "limit_microseconds": LIMIT_MICROSECONDS,
        "outside_run_microseconds": summary(outside),
        "run_with_iobinding_microseconds": summary(inside),
    }
    for name in ("outside_run_microseconds", "run_with_iobinding_microseconds"):
        print(name, payload[name])
    if not arguments.no_write:
        write_result("decode_overhead", payload)


PROMPT = "今天天气真好，我们去公园散步吧。" * 8


def measure(engine: Engine, arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds outside and inside of ``run_with_iobinding``, for each step after the first few."""
    runs: list[float] = []
    run = OrtRunner.run

    def timed(self: OrtRunner) -> None:
        start = time.perf_counter()
        run(self)
        runs.append(time.perf_counter() - start)

    OrtRunner.run = timed  # type: ignore[method-assign]
    outside: list[float] = []
    inside: list[float] = []
    previous = 0.0

    def on_step(step: int) -> None:
        nonlocal previous
        now = time.perf_counter()
        if step > WARM_UP_STEPS:
            outside.append(now - previous - runs[-1])
            inside.append(runs[-1])
        previous = time.perf_counter()

    for _ in range(arguments.rounds):
        engine.generate({"input": PROMPT, "<ans>": ""}, max_new_tokens=arguments.steps, on_step=on_step)
    OrtRunner.run = run  # type: ignore[method-assign]
    return outside, inside


def summary(seconds: list[float]) -> dict[str, float]:
    """Percentiles in microseconds."""
    values = np.percentile(np.array(seconds) * 1e6, [10, 50, 90])
    return dict(zip(("p10", "median", "p90"), values.round(1).tolist(), strict=True))


if __name__ == "__main__":
    main()
