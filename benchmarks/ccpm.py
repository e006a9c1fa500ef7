"""Train a small model on CCPM from nothing, and measure it: ``python -m cpmbee.bench.ccpm FOLDER``.

Look-ups made from the training file first, then the records; one thread. A thousand records of the training file are
held out for the curve. The evaluation file is read once, when training has ended: by the PyTorch model, and by the
engine over its exports in fp32 and int8, options scored. Keeps ``ccpm.json`` and ``ccpm.svg`` with the results; the
run, its checkpoint and the exports in FOLDER. A run that was stopped goes on with ``--resume``.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cpmbee.bench.ccpm_data import CcpmRecord, read_records, split, unseen, vocabulary
from cpmbee.bench.ccpm_plot import plot
from cpmbee.bench.ccpm_samples import CcpmBatches
from cpmbee.bench.ccpm_start import init_model, model_config
from cpmbee.bench.ccpm_table import accuracy, overlap_scorer, translation_table
from cpmbee.bench.environment import SHARED, commit, results_folder, write_result
from cpmbee.engine import Engine
from cpmbee.export.exporter import export
from cpmbee.export.weights import Precision
from cpmbee.model import CpmBee, save_checkpoint
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.evaluation import evaluate
from cpmbee.train.metrics import read_metrics
from cpmbee.train.torch_backend import TorchBackend
from cpmbee.train.trainer import Trainer, TrainerConfig

logger = logging.getLogger("cpmbee.bench")

HELD_OUT = 1000
METRICS = ("choice_accuracy", "loss")
CURVE_POINTS = 200  # of the loss
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")


def main() -> None:
    """Train, measure, and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the run")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "ccpm", help="folder of train and eval.jsonl")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--lookup-steps", type=int, default=450, help="until which look-ups are mixed in")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--masked", type=float, default=0.1, help="share of characters")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate-every", type=int, default=250, help="steps between points of the accuracy curve")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument("--no-write", action="store_true", help="do not keep the results")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    measured_commit = commit()  # now: the tree may move on while this runs
    records = read_records(arguments.data / "train.jsonl")
    training, held_out = split(records, HELD_OUT, arguments.seed)
    tokens = vocabulary(records)
    tokenizer = Tokenizer(tokens)
    started = time.perf_counter(), time.process_time()
    table = translation_table(training)
    model = CpmBee(model_config(tokenizer.vocab_size, arguments.dropout))
    init_model(model, tokenizer, table, arguments.seed)
    trained = train(model, tokenizer, training, held_out, arguments)
    seconds, cpu_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    evaluation = read_records(arguments.data / "eval.jsonl")
    new = unseen(evaluation, training)
    overlap, word_for_word = overlap_scorer(training), table.scorer()
    results = {
        "commit": measured_commit,
        "records": {
            "training": len(training),
            "held out": len(held_out),
            "evaluation": len(evaluation),
            "unseen": len(new),
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "options": {key: value for key, value in vars(arguments).items() if not isinstance(value, Path)},
        **trained,
        "seconds": {"wall, of this process, start and curve included": seconds, "processor": cpu_seconds},
        "bars": {
            name: {"held out": accuracy(score, held_out), "evaluation": accuracy(score, evaluation)}
            for name, score in (("character overlap", overlap), ("translation table", word_for_word))
        },
        "held_out": metrics(Engine(TorchBackend(model), tokenizer), held_out),
        "unseen": metrics(Engine(TorchBackend(model), tokenizer), new),
        "evaluation": measured(model, tokens, evaluation, arguments.folder),
    }
    for name, found in results["evaluation"].items():
        logger.info("evaluation file, %s: %s", name, found)
    if not arguments.no_write:
        write_result("ccpm", results)
        plot(results, results_folder() / "ccpm.svg")


def train(
    model: CpmBee,
    tokenizer: Tokenizer,
    training: Sequence[CcpmRecord],
    held_out: Sequence[CcpmRecord],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Train the model; returns the curve and how fast it went."""

    def held_out_metrics(trained_so_far: CpmBee) -> Mapping[str, float]:
        return metrics(Engine(TorchBackend(trained_so_far), tokenizer), held_out)

    config = TrainerConfig(
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
        precision="bf16",
        log_every=50,
        evaluate_every=arguments.evaluate_every,
        monitor="choice_accuracy",
        higher_is_better=True,
        checkpoint_every=arguments.evaluate_every,
    )
    batches = CcpmBatches(
        training,
        tokenizer,
        batch_size=arguments.batch_size,
        lookup_batches=arguments.lookup_steps,
        masked=arguments.masked,
        seed=arguments.seed,
    )
    trainer = Trainer(model, config, output=arguments.folder / "run", evaluate=held_out_metrics)
    result = trainer.train(batches, resume=arguments.resume)
    lines = read_metrics(arguments.folder / "run")
    steps = [line for line in lines if "loss" in line]
    every = max(1, len(steps) // CURVE_POINTS)
    return {
        "tokens": result.tokens,
        "training_seconds": result.seconds,
        "tokens_per_second": result.tokens / result.seconds,
        "epochs": arguments.batch_size * result.steps / len(training),
        "curve": {
            "loss": [averaged(steps[start : start + every]) for start in range(0, len(steps), every)],
            "held_out": [{"step": line["step"], **line["evaluation"]} for line in lines if "evaluation" in line],
        },
    }


def averaged(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One point of the loss curve: the mean over some steps, for each task, and where it ends."""
    names = {name for step in steps for name in step["task_losses"]}
    losses = {name: [s["task_losses"][name] for s in steps if name in s["task_losses"]] for name in sorted(names)}
    means = {name: sum(values) / len(values) for name, values in losses.items()}
    return {"step": steps[-1]["step"], "seconds": steps[-1]["seconds"], **means}


def measured(
    model: CpmBee, tokens: Sequence[str], records: Sequence[CcpmRecord], folder: Path
) -> dict[str, dict[str, float]]:
    """Metrics of the model, and of its exports through the engine."""
    checkpoint = folder / "checkpoint"
    save_checkpoint(model, checkpoint, overwrite=True)
    (checkpoint / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    found = {"PyTorch": metrics(Engine(TorchBackend(model), Tokenizer(tokens)), records)}
    for precision in PRECISIONS:
        export(checkpoint, folder / precision, precision, overwrite=True)
        found[f"engine, {precision}"] = metrics(Engine.from_pretrained(folder / precision, num_threads=1), records)
    return found


def metrics(engine: Engine, records: Sequence[CcpmRecord]) -> dict[str, float]:
    """Share of records whose right option scores highest, and the loss of right options."""
    tasks = (record.task_record(f"record {number}") for number, record in enumerate(records, 1))
    return dict(evaluate(engine, tasks, METRICS).overall.metrics())


if __name__ == "__main__":
    main()
