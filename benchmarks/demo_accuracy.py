"""What the demo model answers rightly in every precision: all held-out requests, through the exported engine.

``python -m cpmbee.bench.demo_accuracy CHECKPOINT`` makes the figures of the README and of the model card.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpmbee.bench.environment import write_result
from cpmbee.engine import Engine
from cpmbee.export import export
from cpmbee.export.weights import Precision
from cpmbee.train import demo_data
from cpmbee.train.demo import EVALUATION_SEED
from cpmbee.train.demo_accuracy import Accuracy

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int4")
MAX_NEW_TOKENS = 24
_TOGETHER = 512  # requests of one call

Requests = Sequence[dict[str, Any]]


def main() -> None:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the demo model")
    parser.add_argument("--packages", type=Path, default=Path("demo-data"), help="where data packages are kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-write", action="store_true", help="do not keep the result")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    data = demo_data.build(arguments.packages)
    held_out = data.held_out(len(data.held_out_lines), EVALUATION_SEED)
    accuracy: dict[str, dict[str, dict[str, int]]] = {}
    for precision in PRECISIONS:
        found = accuracies(arguments.checkpoint, precision, held_out, arguments.threads)
        accuracy[precision] = {task: {"right": one.right, "total": one.total} for task, one in found.items()}
        print(precision, ", ".join(f"{task} {one}" for task, one in found.items()), flush=True)
    if not arguments.no_write:
        write_result("demo_accuracy", {"accuracy": accuracy})


def accuracies(
    checkpoint: Path, precision: Precision, held_out: Mapping[str, Requests], threads: int
) -> dict[str, Accuracy]:
    """Requests that the exported model answers rightly by greedy decoding, by task.

    Also readings that are chosen by scoring each as the answer to the request without options.
    """
    with tempfile.TemporaryDirectory() as name:
        export(checkpoint, Path(name) / "model", precision, verify=False)
        engine = Engine.from_pretrained(Path(name) / "model", num_threads=threads)
        found = {task: _written(engine, requests) for task, requests in held_out.items()}
        return {**found, "reading, scored": _scored(engine, held_out["choice"])}


def _written(engine: Engine, solved: Requests) -> Accuracy:
    right = 0
    for part in _parts(solved):
        results = engine.generate(
            [{**request, "<ans>": ""} for request in part], beam_size=1, max_new_tokens=MAX_NEW_TOKENS
        )
        right += sum(result.answer == request["<ans>"] for result, request in zip(results, part, strict=True))
    return Accuracy(right, len(solved))


def _scored(engine: Engine, solved: Requests) -> Accuracy:
    right = 0
    for part in _parts(solved):
        questions = [{"input": request["input"], "question": request["question"], "<ans>": ""} for request in part]
        readings = [list(request["options"].values()) for request in part]
        for request, scores in zip(part, engine.score(questions, readings), strict=True):
            best = max(scores, key=lambda score: score.logprob)
            right += best.choice == request["options"][request["<ans>"]]
    return Accuracy(right, len(solved))


def _parts(requests: Requests) -> Iterator[Requests]:
    for start in range(0, len(requests), _TOGETHER):
        yield requests[start : start + _TOGETHER]


if __name__ == "__main__":
    main()
