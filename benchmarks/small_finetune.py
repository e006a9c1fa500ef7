"""Fine-tuning on 24 records with defaults: what the model answers before and after, in how many steps and seconds.

``python -m cpmbee.bench.small_finetune CHECKPOINT`` teaches a model the 24 solar terms by their numbers, on one thread:
once with all of its parameters and once with LoRA adapters. It is the example of `docs/finetuning.md`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cpmbee.bench.environment import shown_command, write_result
from cpmbee.cli import main as cpmbee
from cpmbee.engine import Engine
from cpmbee.model import load_model, open_checkpoint
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.evaluation import evaluate
from cpmbee.train.jsonl import open_records
from cpmbee.train.tasks import TaskFields, read_tasks
from cpmbee.train.torch_backend import TorchBackend

TERMS = (
    "立春 雨水 惊蛰 春分 清明 谷雨 立夏 小满 芒种 夏至 小暑 大暑 "
    "立秋 处暑 白露 秋分 寒露 霜降 立冬 小雪 大雪 冬至 小寒 大寒"
)
WAYS = {"full": [], "lora": ["--lora-rank", "8"]}


def records() -> list[dict[str, str]]:
    """The records: the number of a term, and its name."""
    return [{"input": str(i), "prompt": "节气", "<ans>": term} for i, term in enumerate(TERMS.split(), 1)]


def main() -> None:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="to begin with, such as model/demo")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each kind, with seeds from 0 on (1)")
    parser.add_argument("--no-write", action="store_true", help="do not keep the result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "terms.jsonl"
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records()]
        data.write_text("".join(lines), encoding="utf-8")
        for way, options in WAYS.items():
            for seed in range(arguments.seeds):
                runs.append(measure(way, options, arguments.checkpoint, data, Path(name) / f"{way}-{seed}", seed))
                print(json.dumps(runs[-1], ensure_ascii=False))
    if not arguments.no_write:
        write_result("small_finetune", {"records": len(records()), "runs": runs})


def measure(way: str, options: list[str], checkpoint: Path, data: Path, out: Path, seed: int) -> dict[str, Any]:
    """One run and what the model answers before and after it, by free greedy decoding."""
    command = ["finetune", str(checkpoint), str(data), str(out), "--threads", "1", *options]
    command += ["--seed", str(seed)] if seed else []
    before = answers(checkpoint, data, None)
    begin, used = time.perf_counter(), time.process_time()
    if cpmbee(command):
        raise SystemExit(f"{out}: fine-tuning failed")
    seconds, processor_seconds = time.perf_counter() - begin, time.process_time() - used
    after = answers(out / "model", data, None) if way == "full" else answers(checkpoint, data, out / "delta")
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    shown = ("steps", "epochs", "tokens", "last_loss", "memory")
    options_used = {name: report["training"][name] for name in ("learning_rate", "warmup", "row_length", "batch_rows")}
    return {
        "way": way,
        "run": shown_command("cpmbee", command),
        "before": before,
        "after": after,
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor_seconds, 1),  # what it takes where nobody else wants the cores
        "training_seconds": report["seconds"],
        **{name: report[name] for name in shown},
        **options_used,
    }


def answers(checkpoint: Path, data: Path, delta: Path | None) -> dict[str, float]:
    """Loss and exact match of a checkpoint, with the adapters of a delta."""
    vocabulary = open_checkpoint(checkpoint).vocab_file
    if vocabulary is None:
        raise SystemExit(f"{checkpoint}: has no vocabulary")
    engine = Engine(TorchBackend(load_model(checkpoint, lora=delta)), Tokenizer.from_file(vocabulary))
    tasks = list(read_tasks(open_records(data), TaskFields()))
    return evaluate(engine, tasks, ("loss", "exact_match")).overall.metrics()


if __name__ == "__main__":
    main()
