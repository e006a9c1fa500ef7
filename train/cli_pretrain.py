"""``cpmbee pretrain``: a configuration in, a trained checkpoint out; for several processes, run by ``torchrun``."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        "cpmbee pretrain",
        description="Train a model on a mixture of data sets. OUT/model is the trained checkpoint, OUT/metrics.jsonl "
        "the record of every step, OUT/checkpoints what a stopped run is resumed from. For several processes: "
        "torchrun --nproc-per-node N --no-python cpmbee pretrain CONFIG OUT",
    )
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG", help="JSON file: model, vocabulary, data, evaluation, training")
    add("output", type=Path, metavar="OUT", help="folder of the run")
    add("--resume", action="store_true", help="go on from the newest checkpoint in OUT")
    add(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes",
        help="change a field of the configuration, such as training.steps=200; may be repeated",
    )  # fmt: skip
    arguments = parser.parse_args(argv)

    from cpmbee.train.pretrain import MODEL_FOLDER, pretrain
    from cpmbee.train.pretrain_config import PretrainConfig
    from cpmbee.train.processes import Processes, process_group
    from cpmbee.train.progress import training_progress

    config = PretrainConfig.read(arguments.config, arguments.changes)
    with process_group(), training_progress() as on_step:
        result = pretrain(
            config,
            arguments.output,
            resume=arguments.resume,
            on_step=lambda metrics: on_step(metrics, config.training.steps),
        )
        first = Processes.current().first
    if first:
        best = (
            "" if result.best_value is None else f", best evaluation {result.best_value:.4f} (step {result.best_step})"
        )
        print(
            f"{arguments.output / MODEL_FOLDER}: {result.steps} steps, {result.tokens} tokens in "
            f"{result.seconds:.0f} s{best}"
        )
    return 0
