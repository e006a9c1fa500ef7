"""``cpmbee finetune``: a checkpoint and records in, a better checkpoint or a LoRA delta out."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpmbee.cli_options import OneDelta
from cpmbee.model import open_checkpoint
from cpmbee.model.lora import LoraDelta, read_lora
from cpmbee.train.arguments import above_zero, add_task_fields, not_negative, positive, task_fields
from cpmbee.train.finetune import FinetuneConfig, finetune
from cpmbee.train.finetune_plan import default_learning_rate
from cpmbee.train.lora import ALL_LINEAR, LoraConfig
from cpmbee.train.options import TrainerConfig
from cpmbee.train.predictions import METRICS
from cpmbee.train.processes import Processes, process_group
from cpmbee.train.progress import training_progress

_EPILOG = """\
A record is a request with its right answer under "<ans>", one JSON object a line. Options of records that are choices
("options": {"<option_0>": "...", ...}) are scored in evaluations. With --lora-rank only adapters are trained: OUT/delta
and OUT/adapter go to cpmbee export --lora or cpmbee merge, or on in training with --lora. On several GPUs:
  torchrun --nproc-per-node N --no-python cpmbee finetune ...
"""


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.lora is not None:
        if arguments.lora_rank is not None or arguments.target:
            parser.error("--lora goes on with the rank and the layers of its delta: leave --lora-rank and --target out")
    elif arguments.lora_rank is None and (arguments.target or arguments.lora_alpha or arguments.lora_dropout):
        parser.error("--target, --lora-alpha and --lora-dropout need --lora-rank")
    with process_group():
        with training_progress() as on_step:
            delta = None if arguments.lora is None else read_lora(arguments.lora, arguments.lora_alpha)
            report = finetune(
                arguments.checkpoint,
                arguments.data,
                arguments.out,
                _config(arguments, delta),
                held_out=arguments.eval,
                vocab=arguments.vocab,
                delta=delta,
                device=Processes.current().device(arguments.device),
                resume=arguments.resume,
                on_step=on_step,
            )
        if Processes.current().first:
            best = (
                ""
                if report["best_step"] is None
                else (f"; best after step {report['best_step']}: {report['metric']} {report['best_value']:.4f}")
            )
            where = ", ".join(report[name] for name in ("model", "delta", "adapter") if name in report)
            print(f"{report['steps']} steps, {report['tokens']:,} tokens in {report['seconds']:.0f} s{best}")
            print(f"wrote {where}")
    return 0


def _config(arguments: argparse.Namespace, delta: LoraDelta | None) -> FinetuneConfig:
    lora = None if delta is None else LoraConfig.of(delta, arguments.lora_dropout)
    if arguments.lora_rank is not None:
        targets = tuple(name for group in arguments.target or ["project_q,project_v"] for name in group.split(","))
        alpha = arguments.lora_alpha or 2.0 * arguments.lora_rank
        lora = LoraConfig(arguments.lora_rank, alpha, targets, arguments.lora_dropout)
    trainer = TrainerConfig(
        steps=arguments.steps or 1,
        learning_rate=arguments.learning_rate
        or default_learning_rate(open_checkpoint(arguments.checkpoint).config.hidden_size),
        warmup=arguments.warmup,
        schedule=arguments.schedule,
        weight_decay=arguments.weight_decay,
        accumulation=arguments.accumulation,
        precision=arguments.precision,
        activation_checkpointing=arguments.activation_checkpointing,
        log_every=arguments.log_every,
        tensorboard=arguments.tensorboard,
        evaluate_every=arguments.eval_every,
        patience=arguments.patience,
        checkpoint_every=arguments.checkpoint_every,
    )
    return FinetuneConfig(
        trainer=trainer,
        epochs=arguments.epochs or (None if arguments.steps else "auto"),
        lora=lora,
        row_length=arguments.row_length,
        batch_rows=arguments.batch_rows,
        fields=task_fields(arguments),
        metric=arguments.metric,
        seed=arguments.seed,
        dialect=arguments.dialect,
        threads=arguments.threads,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "cpmbee finetune",
        description="Train a checkpoint further on records with their right answers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="folder, weight file or shard index of the base model")
    add("data", type=Path, metavar="DATA", help="JSON Lines of records, or the folder of a data set")
    add("out", type=Path, metavar="OUT", help="folder to write")
    add("--eval", type=Path, metavar="FILE", help="held-out records; the best evaluation is what is written")
    add("--vocab", type=Path, metavar="FILE", help="vocabulary, if none lies beside the checkpoint")
    add_task_fields(parser)
    add("--resume", action="store_true", help="go on from the last checkpoint in OUT")
    add("--dialect", choices=("huggingface", "original"), default="huggingface", help="of a full model (huggingface)")
    group = parser.add_argument_group("LoRA")
    add = group.add_argument
    add("--lora-rank", type=positive, metavar="R", help="train adapters of this rank instead of the whole model")
    add(
        "--lora",
        action=OneDelta,
        type=Path,
        metavar="DELTA",
        help="go on from these adapters, OpenDelta's or PEFT's",
    )
    add(
        "--lora-alpha",
        type=above_zero,
        metavar="ALPHA",
        help="their output is multiplied by ALPHA / R (2 R, or DELTA's)",
    )
    add("--lora-dropout", type=float, default=0.0, metavar="P", help="of their input (0)")
    add(
        "--target",
        action="append",
        metavar="NAMES",
        help=f"layers to adapt, such as project_q,project_v (the default), w_0, w_1, w_out, {ALL_LINEAR}",
    )
    group = parser.add_argument_group("training")
    add = group.add_argument
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive, metavar="N", help="rounds of the data (3, or what makes 400 steps)")
    length.add_argument("--steps", type=positive, metavar="N", help="optimizer steps, instead of epochs")
    add("--learning-rate", type=above_zero, metavar="X", help="its peak (0.003 at width 128, less in wider models)")
    add("--warmup", type=not_negative, default=100, metavar="N", help="steps (100, at most a tenth of all)")
    add("--schedule", choices=("cosine", "noam", "constant"), default="cosine", help="after the warm-up (cosine)")
    add("--weight-decay", type=float, default=0.0, metavar="X", help="of matrices (0)")
    add("--row-length", type=positive, metavar="N", help="most tokens of a row (what suits the data, at most 512)")
    add("--batch-rows", type=positive, metavar="N", help="rows of a batch, over all processes (what suits the data)")
    add("--accumulation", type=positive, default=1, metavar="N", help="batches of one step (1)")
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the computation (fp32)")
    add("--activation-checkpointing", action="store_true", help="less memory, more time")
    add(
        "--eval-every",
        type=not_negative,
        default=0,
        metavar="N",
        help="steps between evaluations (an epoch; 20 in all)",
    )
    add("--metric", choices=METRICS, help="that decides what is best (choice_accuracy with choices, else loss)")
    add("--patience", type=positive, metavar="N", help="stop after N evaluations that are not better")
    add(
        "--checkpoint-every",
        type=not_negative,
        default=0,
        metavar="N",
        help="steps between those (the same; 1000 at most)",
    )
    add("--log-every", type=positive, default=50, metavar="N", help="steps between lines (50)")
    add("--tensorboard", action="store_true", help="write TensorBoard files to OUT")
    add("--seed", type=not_negative, default=0, metavar="N", help="of data order, adapters and dropout (0)")
    add("--threads", type=not_negative, default=0, metavar="N", help="of the CPU (1 for a small model, else PyTorch's)")
    add("--device", default="auto", help="such as cpu or cuda (auto)")
    return parser
