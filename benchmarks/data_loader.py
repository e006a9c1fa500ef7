"""Batches for training: how full their rows are, how fast they are made, and what that costs the training step.

Run ``python -m cpmbee.bench.data_loader``. The data is CCPM where the development data lies (``CPMBEE_SHARED``), with
the published vocabulary, else a built-in paragraph: as multiple choice, with in-context examples, and as plain text
with masked spans. The training step is that of the demo model's shape, with a vocabulary of the data's characters.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from cpmbee.bench import text
from cpmbee.bench.environment import write_result
from cpmbee.config import ModelConfig
from cpmbee.model import CpmBee
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.batches import TrainingBatch
from cpmbee.train.data.mixture import MixtureText, parse_mixture
from cpmbee.train.data.source import MixtureSource
from cpmbee.train.data.stream import MixtureStream, StreamConfig
from cpmbee.train.data.writer import new_dataset
from cpmbee.train.trainer import Trainer, TrainerConfig

ROW_LENGTHS = (256, 512, 1024, 2048)
BATCH_TOKENS = 8192
STEP_ROWS, STEP_ROW_LENGTH = 8, 256
POOL = 1000  # samples that plain best fit packs at once
MIXTURES: dict[str, Any] = {
    "choice": [{"dataset": "choice"}],
    "choice, 0 to 3 examples": [{"dataset": "choice", "incontext_weight": [1, 1, 1, 1]}],
    "masked text": [{"dataset": "text", "transforms": [[{"name": "mask_spans"}, {"name": "perturb_format"}]]}],
}


def main() -> None:
    """Measure, print Markdown tables and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, default=20, help="batches of each measurement")
    parser.add_argument("--steps", type=int, default=12, help="training steps of each measurement; 0 leaves them out")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of the training step; the median counts")
    parser.add_argument("--no-write", action="store_true", help="do not keep the result")
    arguments = parser.parse_args()
    tokens, requests, source = text.load()
    tokenizer = Tokenizer(tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_datasets(folder, requests)
        packing = [
            packed(folder, tokenizer, mixture, row_length, arguments.batches)
            for mixture in MIXTURES
            for row_length in ROW_LENGTHS
        ]
        words = Tokenizer((*text.SPECIALS, *characters(requests)))
        steps = step_times(folder, words, arguments.steps, arguments.repeats) if arguments.steps else {}
    print("| data | row | padding | best fit | one sample a row | made, tokens/s |\n|---|---:|---:|---:|---:|---:|")
    for row in packing:
        print(
            f"| {row['data']} | {row['row_length']} | {row['padding']:.2%} | {row['padding_best_fit']:.2%} "
            f"| {row['padding_unpacked']:.2%} | {row['tokens_per_s']:,.0f} |"
        )
    if steps:
        print("\n| training step, batches are | ms | against ready ones |\n|---|---:|---:|")
        for way, milliseconds in steps.items():
            print(f"| {way} | {milliseconds:.1f} | {milliseconds / steps['ready']:.3f} |")
    print(f"\nData: {source}.")
    if not arguments.no_write:
        write_result("data_loader", {"data": source, "packing": packing, "step_ms": steps})


def characters(requests: list[dict[str, Any]]) -> list[str]:
    """The characters of some requests."""
    return sorted(set(json.dumps(requests, ensure_ascii=False)) - {"<", " "})


def write_datasets(folder: Path, requests: list[dict[str, Any]]) -> None:
    """The requests as multiple choice (a drawn answer) and their texts as plain text."""
    answers = np.random.default_rng(0).integers(0, 4, len(requests)).tolist()
    solved = ({**request, "<ans>": f"<option_{answer}>"} for request, answer in zip(requests, answers, strict=True))
    texts = ({"text": request["input"]} for request in requests)
    for name, records in {"choice": solved, "text": texts}.items():
        with new_dataset(folder / name, overwrite=False) as writer:
            for record in records:
                writer.write(record)
            writer.finish({})
    for name, mixture in MIXTURES.items():
        (folder / f"{name}.json").write_text(json.dumps(mixture), encoding="utf-8")


def stream_of(folder: Path, tokenizer: Tokenizer, mixture: str, row_length: int, rows: int) -> MixtureStream:
    """The batches of a mixture, made when they are asked for."""
    config = StreamConfig(row_length, rows)
    return MixtureStream(parse_mixture(MixtureText.read(folder / f"{mixture}.json")), tokenizer, config)


def packed(folder: Path, tokenizer: Tokenizer, mixture: str, row_length: int, batches: int) -> dict[str, Any]:
    """How full rows are and how fast they are made, beside plain best fit and rows of one sample."""
    rows = BATCH_TOKENS // row_length
    stream = stream_of(folder, tokenizer, mixture, row_length, rows)
    stream.next_batch()  # fills the buffer
    before = stream.statistics.tokens, stream.statistics.seconds
    lengths = [length for _ in range(batches) for length in sample_lengths(stream.next_batch())]
    made = stream.statistics
    best_fit = sum(best_fit_rows(lengths[i : i + POOL], row_length) for i in range(0, len(lengths), POOL))
    widest = [max(lengths[i : i + rows]) * len(lengths[i : i + rows]) for i in range(0, len(lengths), rows)]
    return {
        "data": mixture,
        "row_length": row_length,
        "padding": made.padding_share,
        "padding_best_fit": 1 - sum(lengths) / (best_fit * row_length),
        "padding_unpacked": 1 - sum(lengths) / sum(widest),
        "tokens_per_s": (made.tokens - before[0]) / (made.seconds - before[1]),
        "mean_sample": sum(lengths) / len(lengths),
        "over_long": sum(made.over_long.values()),
    }


def sample_lengths(batch: TrainingBatch) -> Iterator[int]:
    """Tokens of every sample of a batch."""
    for spans, used in zip(batch.spans, batch.length.tolist(), strict=True):
        yield from np.bincount(spans[:used]).tolist()


def best_fit_rows(lengths: list[int], row_length: int) -> int:
    """Rows that plain best fit needs: each sample into the fullest row that has room for it, else into a new one."""
    used: list[int] = []
    for length in lengths:
        fitting = [row for row, tokens in enumerate(used) if tokens + length <= row_length]
        if fitting:
            used[max(fitting, key=used.__getitem__)] += length
        else:
            used.append(length)
    return len(used)


def step_times(folder: Path, tokenizer: Tokenizer, steps: int, repeats: int) -> dict[str, float]:
    """Milliseconds of a training step of the demo model's shape: batches ready, made in the step, made beside it."""
    ready = stream_of(folder, tokenizer, "choice", STEP_ROW_LENGTH, STEP_ROWS)
    batches = [ready.next_batch() for _ in range(steps)]
    times: dict[str, list[float]] = {"ready": [], "made in the step": [], "made beside it": []}
    for _ in range(repeats):
        inline = stream_of(folder, tokenizer, "choice", STEP_ROW_LENGTH, STEP_ROWS)
        beside = MixtureSource(folder / "choice.json", tokenizer, row_length=STEP_ROW_LENGTH, batch_rows=STEP_ROWS)
        ways: dict[str, Iterable[TrainingBatch]] = {
            "ready": batches,
            "made in the step": iter(inline.next_batch, None),
            "made beside it": beside,
        }
        for way, source in ways.items():
            times[way].append(1000 * step_seconds(tokenizer, source, steps))
        beside.close()
    return {way: median(values) for way, values in times.items()}


def step_seconds(tokenizer: Tokenizer, source: Iterable[TrainingBatch], steps: int) -> float:
    """Seconds a step, after two of warm-up."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=128,
        num_attention_heads=4,
        dim_head=32,
        dim_ff=320,
        num_hidden_layers=4,
        position_bias_num_buckets=64,
        position_bias_max_distance=128,
    )
    batches = iter(source)
    model = CpmBee(config)
    model.init_parameters(torch.Generator().manual_seed(0))
    trainer = Trainer(model, TrainerConfig(steps=2))
    trainer.train(list(islice(batches, 2)))
    trainer.config = TrainerConfig(steps=steps)
    started = time.perf_counter()
    trainer.train(batches)
    return (time.perf_counter() - started) / (steps - 2)


if __name__ == "__main__":
    main()
