"""The training run of the demo model: its curve, its evaluations, how fast its data comes.

``python -m cpmbee.bench.demo_training RUN`` reads the record that ``python -m cpmbee.train.demo`` left in OUT-training,
and times the data by itself. What the model answers rightly: `cpmbee.bench.demo_accuracy`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

from cpmbee.bench.environment import write_result
from cpmbee.tokenizer import Tokenizer
from cpmbee.train import demo_data, readings, traditional
from cpmbee.train.demo_batches import DemoBatches
from cpmbee.train.demo_data import DemoData
from cpmbee.train.metrics import read_metrics

STEPS_A_POINT = 50  # of the curve
TIMED_BATCHES = 64


def main() -> None:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the training run")
    parser.add_argument("--packages", type=Path, default=Path("demo-data"), help="where data packages are kept")
    parser.add_argument("--no-write", action="store_true", help="do not keep the result")
    arguments = parser.parse_args()
    data = demo_data.build(arguments.packages)
    steps = [line for line in read_metrics(arguments.run) if "loss" in line]
    evaluations = [line for line in read_metrics(arguments.run) if "evaluation" in line]
    result = {
        "run": {
            "steps": len(steps),
            "seconds": steps[-1]["seconds"],
            "tokens": steps[-1]["tokens"],
            "tokens_per_second": steps[-1]["tokens"] / steps[-1]["seconds"],
            "padding": mean(step["padding"] for step in steps),
        },
        "loader_tokens_per_second": loader_speed(data, Tokenizer(data.vocabulary)),
        "majority": {
            "traditional": traditional.character_majority_share(data.lines, data.held_out_lines),
            "reading": readings.majority_share(data.held_out_readings),
        },
        "curve": list(curve(steps)),
        "evaluations": [{"step": line["step"], **line["evaluation"]} for line in evaluations],
    }
    for name in ("run", "loader_tokens_per_second", "majority"):
        print(f"{name}: {result[name]}")
    if not arguments.no_write:
        write_result("demo_training", result)


def loader_speed(data: DemoData, tokenizer: Tokenizer) -> float:
    """Tokens a second that the training data comes at when nothing waits for it."""
    batches = iter(DemoBatches(data, tokenizer, batch_size=64, seed=0))
    started = time.perf_counter()
    tokens = sum(int(batch.length.sum()) for batch in islice(batches, TIMED_BATCHES))
    return tokens / (time.perf_counter() - started)


def curve(steps: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Losses averaged over a few steps each, all and per task."""
    for start in range(0, len(steps), STEPS_A_POINT):
        part = steps[start : start + STEPS_A_POINT]
        tasks = {task for step in part for task in step["task_losses"]}
        yield {
            "step": part[-1]["step"],
            "seconds": part[-1]["seconds"],
            "loss": mean(step["loss"] for step in part),
            "task_losses": {
                task: mean(step["task_losses"][task] for step in part if task in step["task_losses"])
                for task in sorted(tasks)
            },
        }


if __name__ == "__main__":
    main()
