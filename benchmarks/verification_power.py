"""How often verification errs: right exports that it refuses, wrong ones that it passes.

``python -m cpmbee.bench.verification_power`` exports small random models of many shapes in all quantized formats, some
with a LoRA delta, verifies each, and does the same with folders that have one mistake each (`cpmbee.bench.mistakes`).
For right exports it records how far each measure is from its bound: in standard deviations of its logarithm, and by the
probability to exceed it if the largest tenth continues as a power law.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from cpmbee.bench.environment import commit, write_result
from cpmbee.bench.mistakes import all_mistakes
from cpmbee.bench.synthetic import vocabulary
from cpmbee.cache_types import CACHE_TYPES
from cpmbee.config import ModelConfig
from cpmbee.errors import CpmBeeError
from cpmbee.export.divergence import BOUNDS, Measured, Rounding
from cpmbee.export.exporter import export
from cpmbee.export.packing import BLOCK_SIZES
from cpmbee.export.quantize import METHODS
from cpmbee.export.verification import examine
from cpmbee.model import CpmBee, save_checkpoint
from cpmbee.model.lora import LoraDelta, LoraFactors
from cpmbee.model.tensor_names import expected_tensors, is_linear

VOCABULARY = 300
TAIL = 0.1  # share of the largest values that a power law is fitted to
MEASURES = ("mean", "position", "token", "logit")


def main() -> None:
    """Measure, print and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--right", type=int, default=300, help="exports without a mistake")
    parser.add_argument("--wrong", type=int, default=2, help="models in which each mistake is made, in both precisions")
    parser.add_argument("--processes", type=int, default=1, help="that export and verify side by side")
    parser.add_argument("--name", default="verification_power", help="of the result")
    parser.add_argument("--no-write", action="store_true", help="do not keep the result")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measured_commit = commit()
    with tempfile.TemporaryDirectory() as name:
        right = right_exports(arguments.right, arguments.processes)
        wrong = wrong_exports(arguments.wrong, Path(name))
    if not arguments.no_write:
        bounds = asdict(BOUNDS)
        write_result(arguments.name, {"commit": measured_commit, "bounds": bounds, "right": right, "wrong": wrong})


def right_exports(count: int, processes: int) -> dict[str, Any]:
    """Exports without a mistake: those that were refused, and how far the others were from that."""
    found: dict[str, list[float]] = {measure: [] for measure in MEASURES}
    refused = []
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for done, (facts, measured) in enumerate(pool.map(right_export, range(count)), 1):
            for values in measured:
                for measure, value in zip(MEASURES, values, strict=True):
                    found[measure].append(value)
            if facts["refused_by"]:
                refused.append(facts)
                print(facts, flush=True)
            if done % 20 == 0:
                print(f"{done} right exports, {len(refused)} refused", flush=True)
    summary = {measure: distance(values, getattr(BOUNDS, measure)) for measure, values in found.items()}
    for measure, facts_of in summary.items():
        print(measure, {name: float(f"{number:.3g}") for name, number in facts_of.items()})
    return {"exports": count, "refused": refused, "measures": summary}


def right_export(seed: int) -> tuple[dict[str, Any], list[tuple[float, ...]]]:
    """A random model, exported in a random way and verified: what it was, and the measures of each comparison."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    config = config_of(rng)
    options = {
        "precision": str(rng.choice(["int8", "int4"])),
        "block_size": int(rng.choice(BLOCK_SIZES)),
        "head_bits": int(rng.choice([4, 8])),
        "method": str(rng.choice(METHODS)),
        "cache": str(rng.choice(CACHE_TYPES)),
    }
    lora = random_delta(config, rng) if rng.random() < 0.3 else None
    with tempfile.TemporaryDirectory() as name, measuring() as measured:
        checkpoint, folder = Path(name) / "checkpoint", Path(name) / "model"
        write_checkpoint(checkpoint, config, seed)
        export(checkpoint, folder, lora=lora, verify=False, **options)  # type: ignore[arg-type]
        report = examine(folder, checkpoint, lora=lora)
    refused_by = [asdict(check) for check in report.checks if not check.passed]
    facts = {"seed": seed, **options, "lora": lora is not None, "refused_by": refused_by}
    return facts, [worst(one) for one in measured]


def worst(measured: Measured) -> tuple[float, ...]:
    """The largest of each of `MEASURES`."""
    kinds = measured.kinds.values()
    return (
        max(kind.mean for kind in kinds),
        max(kind.position for kind in kinds),
        measured.token,
        max(kind.logit for kind in kinds),
    )


def wrong_exports(count: int, scratch: Path) -> list[dict[str, Any]]:
    """Exports with one mistake each: by which check each was refused, None where it passed."""
    rows = []
    for seed in range(count):
        for precision, bits in (("int8", 8), ("int4", 4)):
            checkpoint, folder = scratch / "checkpoint", scratch / "model"
            write_checkpoint(checkpoint, config_of(np.random.default_rng(seed), layers=3), seed)
            for mistake, make in all_mistakes(bits).items():
                export(checkpoint, folder, precision, block_size=32, verify=False, overwrite=True)  # type: ignore[arg-type]
                with make(folder):
                    by = refusal(folder, checkpoint)
                print(f"{precision} | {mistake} | {by or 'PASSED'}", flush=True)
                rows.append({"mistake": mistake, "precision": precision, "seed": seed, "refused_by": by})
                shutil.rmtree(folder)
    return rows


def refusal(folder: Path, checkpoint: Path) -> str | None:
    """The first check that a folder does not pass, or the error that it cannot be opened with."""
    try:
        report = examine(folder, checkpoint)
    except CpmBeeError as error:
        return f"{type(error).__name__}: {error}".replace(str(folder.parent), "")
    return next((check.name for check in report.checks if not check.passed), None)


@contextmanager
def measuring() -> Iterator[list[Measured]]:
    """Collects what every comparison of rounded logits measures."""
    measured: list[Measured] = []
    measure = Rounding.measure

    def recorded(self: Rounding, answers: Any) -> Measured:
        measured.append(measure(self, answers))
        return measured[-1]

    with mock.patch.object(Rounding, "measure", recorded):
        yield measured


def distance(values: list[float], bound: float) -> dict[str, float]:
    """How far a measure was from its bound."""
    logs = np.sort(np.log(np.maximum(values, 1e-6)))
    start = logs[int(len(logs) * (1 - TAIL))]
    beyond = logs[logs > start] - start
    rate = float(beyond.mean()) if len(beyond) else 1e-9  # of an exponential tail of logarithms
    over = float(len(beyond) / len(logs) * np.exp(-max(0.0, np.log(bound) - start) / rate))
    deviations = (np.log(bound) - logs.mean()) / max(float(logs.std()), 1e-9)
    return {
        "comparisons": len(logs),
        "bound": bound,
        "median": float(np.exp(np.median(logs))),
        "largest": float(np.exp(logs[-1])),
        "standard_deviations_to_bound": float(deviations),
        "probability_to_exceed": over,
    }


def config_of(rng: np.random.Generator, layers: int = 0) -> ModelConfig:
    """A small model's configuration."""
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=int(rng.choice([20, 32, 64, 96, 130])),
        num_attention_heads=int(rng.integers(2, 5)),
        dim_head=int(rng.choice([8, 16, 32])),
        dim_ff=int(rng.choice([28, 64, 160])),
        num_hidden_layers=layers or int(rng.integers(1, 5)),
        position_bias_num_buckets=32,
        position_bias_num_segment_buckets=64,
        position_bias_max_distance=128,
        half=bool(rng.integers(2)),
    )


def write_checkpoint(folder: Path, config: ModelConfig, seed: int) -> None:
    """A random model: sharp or flat attention and logits, even or uneven norms."""
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    model = CpmBee(config)
    model.init_parameters(generator)
    sharpness = {
        "project_q": rng.choice([1, 2, 4]),
        "w_0": rng.choice([1, 2]),
        "output_layernorm": rng.choice([1, 2, 4]),
    }
    spread = float(rng.choice([0.1, 0.5, 1.0]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.copy_(torch.exp(spread * torch.randn(parameter.shape, generator=generator)))
            for part, factor in sharpness.items():
                if part in name:
                    parameter.mul_(float(factor))
    shutil.rmtree(folder, ignore_errors=True)
    save_checkpoint(model.eval(), folder, file_format="safetensors")
    (folder / "vocab.txt").write_text("\n".join(vocabulary(config.vocab_size)) + "\n", encoding="utf-8")


def random_delta(config: ModelConfig, rng: np.random.Generator, rank: int = 4) -> LoraDelta:
    """A delta of some linear layers, as large as a fine-tuning's."""
    factors = {}
    for name, shape in expected_tensors(config).items():
        if is_linear(name, shape) and rng.random() < 0.5:
            a, b = rng.normal(0, 0.2, (rank, shape[1])), rng.normal(0, 0.2, (shape[0], rank))
            factors[name] = LoraFactors(a.astype(np.float32), b.astype(np.float32), 1.0)
    return LoraDelta(Path("random"), factors)


if __name__ == "__main__":
    main()
