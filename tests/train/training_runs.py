"""A tiny training run with every feature on, as a function and as a command, so that tests can kill and multiply it."""

import argparse
import itertools
import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpmbee.config import ModelConfig
from cpmbee.model import CpmBee
from cpmbee.model.cpmbee import initial_values
from cpmbee.tokenizer import Tokenizer
from cpmbee.train import run_checkpoints
from cpmbee.train.batches import TrainingBatch, collate, encode_sample
from cpmbee.train.filling import empty_model, fill
from cpmbee.train.metrics import StepMetrics
from cpmbee.train.options import TrainerConfig
from cpmbee.train.processes import Processes, process_group
from cpmbee.train.source import rows_of_rank
from cpmbee.train.step import OptimizerStep
from cpmbee.train.trainer import Trainer, TrainingResult
from cpmbee.train.validation import HeldOutLoss

LETTERS = "abcdefghijklmnop"
TOKENS = ["<pad>", "<unk>", "<mask>", "<s>", "</s>", "<root>", "<ans>", "</n>", "</_>", "<x>", "copy", "last", *LETTERS]
ROW_LENGTH = 64


class LetterSource:
    """Two tasks on random letters, packed into rows; resumable; every process takes its rows of the same stream."""

    tasks = ("copy", "last")

    def __init__(self, seed: int, rows: int) -> None:
        self.tokenizer = Tokenizer(TOKENS)
        self.rng = np.random.default_rng(seed)
        self.rows = rows
        self.handed_out = 0

    def _sample(self) -> tuple[dict[str, Any], int]:
        text = "".join(self.rng.choice(list(LETTERS), self.rng.integers(2, 6)))
        # Several in one sample are told apart by the extension vocabulary.
        special = "".join(f"<x_{number}>" for number in self.rng.permutation(3)[: self.rng.integers(3)])
        if self.rng.random() < 0.5:
            return {"copy": text + special, "<ans>": text + special}, 0
        return {"last": text, "<ans>": text[-1]}, 1

    def batch(self) -> TrainingBatch:
        """The next batch of the global stream."""
        drawn = [self._sample() for _ in range(2 * self.rows)]
        samples = [encode_sample(data, self.tokenizer, task=task) for data, task in drawn]
        rows = [samples[i :: self.rows] for i in range(self.rows)]
        return collate(rows, self.tokenizer, ROW_LENGTH)

    def __iter__(self) -> Iterator[TrainingBatch]:
        processes = Processes.current()
        while True:
            batch = self.batch()
            self.handed_out += 1
            yield rows_of_rank(batch, processes.rank, processes.world_size)

    def state_dict(self) -> dict[str, Any]:
        return {"handed_out": self.handed_out, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.handed_out = state["handed_out"]
        self.rng.bit_generator.state = state["rng"]


def tiny_model(dropout: float = 0.0, seed: int = 0) -> CpmBee:
    model = empty_model(ModelConfig(len(TOKENS), 32, 2, 16, 48, 2, position_bias_num_buckets=32, dropout_p=dropout))
    generator = torch.Generator().manual_seed(seed)
    Processes.current().shard(model, torch.device("cpu"))
    fill(model, lambda name: initial_values(model.get_parameter(name).shape, generator), torch.device("cpu"))
    return model


def run(
    output: Path | None,
    *,
    resume: bool = False,
    rows: int = 4,
    dropout: float = 0.0,
    kill_at: int | None = None,
    interrupt_at: int | None = None,
    options: dict[str, Any] | None = None,
) -> tuple[CpmBee, TrainingResult]:
    """Train.

    ``kill_at`` is the step in whose middle the process kills itself, ``interrupt_at`` that in which it gets a Ctrl-C;
    of several processes the last one does.
    """
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = tiny_model(dropout)
    config = TrainerConfig.from_dict(
        {"steps": 8, "learning_rate": 0.01, "warmup": 3, "log_every": 4, **(options or {})}
    )
    held_out = LetterSource(99, 4)
    source = LetterSource(7, rows)

    def watch(metrics: StepMetrics) -> None:
        if kill_at is not None and metrics.step == kill_at - 1:
            # The next backward pass is the middle of the fatal step.
            model.encoder.output_layernorm.weight.register_hook(lambda _: die())

    processes = Processes.current()
    if interrupt_at is not None and processes.rank == processes.world_size - 1:
        backward, steps = OptimizerStep._backward, itertools.count(1)

        def interrupted(*arguments: Any) -> torch.Tensor:
            if next(steps) == interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)
            return backward(*arguments)

        OptimizerStep._backward = interrupted  # type: ignore[method-assign]
    trainer = Trainer(
        model,
        config,
        output=output,
        evaluate=HeldOutLoss([held_out.batch() for _ in range(2)], LetterSource.tasks),
        on_step=watch,
    )
    return model, trainer.train(source, resume=resume)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_while_saving(step: int, moment: str) -> None:
    """Let the process kill itself while it writes the checkpoint of a step."""
    name = f"step-{step:08d}"
    save, rename = run_checkpoints.save, Path.rename

    def save_and_die(tensors: Any, storage_writer: Any, **options: Any) -> Any:
        result = save(tensors, storage_writer=storage_writer, **options)
        if moment == "tensors" and name in str(storage_writer.path):
            die()
        return result

    def rename_or_die(path: Path, target: Path) -> Path:
        if moment == "rename" and name in str(path):
            die()
        return rename(path, target)

    run_checkpoints.save = save_and_die  # type: ignore[assignment]
    Path.rename = rename_or_die  # type: ignore[assignment, method-assign]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--interrupt-at", type=int)
    parser.add_argument("--kill-while-saving", nargs=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--options", type=json.loads, default={})
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    if args.kill_while_saving:
        kill_while_saving(int(args.kill_while_saving[0]), args.kill_while_saving[1])
    with process_group():
        run(
            args.output,
            resume=args.resume,
            rows=args.rows,
            dropout=args.dropout,
            kill_at=args.kill_at,
            interrupt_at=args.interrupt_at,
            options=args.options,
        )


if __name__ == "__main__":
    main()
