"""``cpmbee export`` and ``cpmbee verify``: arguments in, a summary out; the work is in the library."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Literal

from cpmbee.cache_types import CACHE_TYPES
from cpmbee.cli_options import OneDelta, add_generation_options, generation_options
from cpmbee.errors import ConfigError
from cpmbee.export.packing import BITS, BLOCK_SIZES
from cpmbee.export.quantize import DEFAULT_BLOCK_SIZE, DEFAULT_HEAD_BITS, METHODS
from cpmbee.export.report import ExportReport, VerificationReport
from cpmbee.export.weights import PRECISIONS
from cpmbee.generation_config import GenerationConfig
from cpmbee.progress import ProgressBar


def export_main(argv: list[str]) -> int:
    """Run ``cpmbee export``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="cpmbee export", description="Turn a CPM-Bee checkpoint into an ONNX model folder, and verify it."
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder, weight file or shard index")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of the stored matrices (fp32)")
    parser.add_argument(
        "--cache", choices=CACHE_TYPES, help="how keys and values are kept (fp32 with precision fp32, else fp16)"
    )
    parser.add_argument("--vocab", type=Path, metavar="FILE", help="vocabulary, if none lies beside the checkpoint")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the result with the reference")
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder that is there")
    _add_lora(parser)
    _add_quality(parser)
    group = parser.add_argument_group("quantization (precision int8 or int4)")
    group.add_argument(
        "--block-size",
        type=int,
        choices=BLOCK_SIZES,
        default=DEFAULT_BLOCK_SIZE,
        help=f"weights that share a scale ({DEFAULT_BLOCK_SIZE})",
    )
    group.add_argument(
        "--head-bits",
        type=int,
        choices=BITS,
        default=DEFAULT_HEAD_BITS,
        help=f"of embedding and head ({DEFAULT_HEAD_BITS})",
    )
    group.add_argument("--method", choices=METHODS, default="search", help="how scales are found (search)")
    group.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="JSON Lines of requests to read: make rounding errors cancel out on inputs like theirs",
    )
    group.add_argument(
        "--exact-activations",
        nargs="+",
        default=[],
        metavar="LAYER",
        help="layers (0, 1, ...) whose products take activations in fp32; auto: measure which need it",
    )
    add_generation_options(parser, "defaults of generation, kept in OUT/generation_config.json")
    args = parser.parse_args(argv)
    try:
        defaults = GenerationConfig().updated(**generation_options(args))
        exact_activations = _layers(args.exact_activations)
    except ConfigError as error:
        parser.error(str(error))
    from cpmbee.export import export

    with ProgressBar() as progress:
        report = export(
            args.checkpoint,
            args.out,
            args.precision,
            block_size=args.block_size,
            head_bits=args.head_bits,
            method=args.method,
            calibration=args.calibration,
            exact_activations=exact_activations,
            cache=args.cache,
            vocab=args.vocab,
            lora=args.lora,
            lora_alpha=args.lora_alpha,
            verify=not args.no_verify,
            quality=args.quality,
            generation_config=defaults,
            overwrite=args.overwrite,
            progress=progress,
        )
    print("\n".join(describe_export(report)))
    return 0


def verify_main(argv: list[str]) -> int:
    """Run ``cpmbee verify``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="cpmbee verify", description="Compare a model folder with the checkpoint it was exported from."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="model folder")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="what it was exported from")
    _add_lora(parser)
    _add_quality(parser)
    args = parser.parse_args(argv)
    from cpmbee.export.verification import examine

    with ProgressBar() as progress:
        report = examine(
            args.out,
            args.checkpoint,
            lora=args.lora,
            lora_alpha=args.lora_alpha,
            quality=args.quality,
            progress=progress,
        )
    print("\n".join(describe_verification(report)))
    return 0 if report.passed else 1


def describe_export(report: ExportReport) -> list[str]:
    """Lines for a terminal: what was written, and what its verification found."""
    lines = [
        f"exported {report.num_parameters:,} parameters in {report.precision}, cache in {report.cache} "
        f"({report.num_bytes / 1e6:.1f} MB), to {report.folder} in {report.seconds:.1f} s"
    ]
    if report.matrices:
        worst = max(report.matrices, key=lambda matrix: matrix.error)
        lines.append(f"  relative error of quantized matrices at most {worst.error:.4f} ({worst.name})")
    if report.verification is None:
        return [*lines, "not verified"]
    return [*lines, *describe_verification(report.verification)]


def describe_verification(report: VerificationReport) -> list[str]:
    """Lines for a terminal: every check, every note, the verdict."""
    lines = [f"  {'ok    ' if check.passed else 'FAILED'} {check.name}: {check.detail}" for check in report.checks]
    lines += [f"  note   {note}" for note in report.notes]
    if report.quality is not None:
        lines.append(f"  quality against fp32: {report.quality}")
    failed = sum(not check.passed for check in report.checks)
    verdict = f"{failed} of {len(report.checks)} checks FAILED" if failed else f"all {len(report.checks)} checks passed"
    return [*lines, f"{verdict} in {report.seconds:.1f} s"]


def _layers(words: list[str]) -> list[int] | Literal["auto"]:
    """Layers by their numbers, or "auto".

    Raises:
        ConfigError: a word is neither.
    """
    if words == ["auto"]:
        return "auto"
    if wrong := [word for word in words if not word.isdecimal()]:
        raise ConfigError(f"--exact-activations takes numbers of layers, or auto alone, not {wrong[0]!r}")
    return [int(word) for word in words]


def _add_lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora", action=OneDelta, type=Path, metavar="DELTA", help="LoRA delta that is merged into the weights"
    )
    parser.add_argument("--lora-alpha", type=float, metavar="ALPHA", help="its alpha, if no configuration says it")


def _add_quality(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quality",
        type=Path,
        metavar="FILE",
        help="JSON Lines of requests with their answers: measure how far the model is from fp32 on them",
    )
