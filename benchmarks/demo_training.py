"""The training run of the demo model, and what the model that came out of it answers rightly in every precision.

``python -m cpmbee.bench.demo_training RUN CHECKPOINT`` reads the record that ``python -m cpmbee.train.demo`` left in
OUT-training, times the data by itself, and asks the exported model the held-out requests.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

from cpmbee.bench.environment import write_result
from cpmbee.engine import Engine
from cpmbee.export import export
from cpmbee.export.weights import Precision
from cpmbee.tokenizer import Tokenizer
from cpmbee.train import demo_data, readings, traditional
from cpmbee.train.demo import EVALUATION_SEED
from cpmbee.train.demo_batches import DemoBatches
from cpmbee.train.demo_data import DemoData
from cpmbee.train.metrics import read_metrics

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int4")
STEPS_A_POINT = 50  # of the curve
TIMED_BATCHES = 64
MAX_NEW_TOKENS = 24


def main() -> None:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the training run")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="what it wrote")
    parser.add_argument("--packages", type=Path, default=Path("demo-data"), help="where data packages are kept")
    parser.add_argument("--requests", type=int, default=1000, help="held-out ones per task")
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
        "accuracy": accuracies(arguments.checkpoint, data.held_out(arguments.requests, EVALUATION_SEED)),
        "curve": list(curve(steps)),
        "evaluations": [{"step": line["step"], **line["evaluation"]} for line in evaluations],
    }
    for name in ("run", "loader_tokens_per_second", "majority", "accuracy"):
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


def accuracies(checkpoint: Path, held_out: Mapping[str, Sequence[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Share of requests that the exported model answers rightly by greedy decoding: per precision and task."""
    found: dict[str, dict[str, float]] = {}
    for precision in PRECISIONS:
        with tempfile.TemporaryDirectory() as name:
            export(checkpoint, Path(name) / "model", precision, verify=False)
            engine = Engine.from_pretrained(Path(name) / "model")
            found[precision] = {task: _accuracy(engine, requests) for task, requests in held_out.items()}
            found[precision]["reading, readings scored"] = _scored(engine, held_out["choice"])
            del engine
    return found


def _accuracy(engine: Engine, solved: Sequence[dict[str, Any]]) -> float:
    questions = [{**request, "<ans>": ""} for request in solved]
    results = engine.generate(questions, beam_size=1, max_new_tokens=MAX_NEW_TOKENS)
    right: list[bool] = [result.answer == request["<ans>"] for result, request in zip(results, solved, strict=True)]
    return sum(right) / len(right)


def _scored(engine: Engine, solved: Sequence[dict[str, Any]]) -> float:
    """Share of choices that are right when each reading is scored as the answer to the request without options."""
    questions = [{"input": request["input"], "question": request["question"], "<ans>": ""} for request in solved]
    readings = [list(request["options"].values()) for request in solved]
    best = [max(scores, key=lambda score: score.logprob).choice for scores in engine.score(questions, readings)]
    right: list[bool] = [
        reading == request["options"][request["<ans>"]] for reading, request in zip(best, solved, strict=True)
    ]
    return sum(right) / len(right)


if __name__ == "__main__":
    main()
