"""``cpmbee data build`` and ``cpmbee data inspect``: arguments in, a summary out; the work is in the library."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from cpmbee.progress import ProgressBar
from cpmbee.train.arguments import not_negative, positive
from cpmbee.train.data.build import BuildReport, TextOptions, build_dataset
from cpmbee.train.data.inspection import histogram_lines, inspect_dataset
from cpmbee.train.data.opening import open_dataset
from cpmbee.train.data.writer import DEFAULT_SHARD_BYTES

_SAMPLE_WIDTH = 300  # characters of a sample that are shown


def main(argv: list[str]) -> int:
    """Run ``cpmbee data``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="cpmbee data", description="Build data sets for training, look into them.")
    commands = parser.add_subparsers(required=True, metavar="build|inspect")
    _add_build(commands.add_parser("build", help="from text, JSON Lines, or a data set of the original tools"))
    _add_inspect(commands.add_parser("inspect", help="counts, lengths, samples, checksums"))
    arguments = parser.parse_args(argv)
    run = arguments.run
    code: int = run(arguments)
    return code


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Build a data set from a file of one text a line (\\n stands for a line break), of one JSON object a line (a "
        "nested dict of strings), or from a data set that the original tools wrote."
    )
    parser.add_argument("source", type=Path, metavar="IN", help="file, folder of a data set, or - for standard input")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument(
        "--format", choices=("text", "jsonl"), help="of the file (by its name: .jsonl and .json, else text)"
    )
    parser.add_argument("--min-length", type=positive, default=1, metavar="N", help="text: leave out shorter ones (1)")
    parser.add_argument("--max-length", type=positive, metavar="N", help="text: cut at line breaks to such pieces (no)")
    parser.add_argument("--no-clean", action="store_true", help="text: keep blanks and control characters as they are")
    parser.add_argument("--escape", action="store_true", help="JSON: every < in a value is literal, not markup")
    parser.add_argument("--skip-bad", action="store_true", help="leave out and count lines that cannot be read")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is there")
    parser.add_argument(
        "--shard-mb", type=positive, default=DEFAULT_SHARD_BYTES >> 20, metavar="MB", help="size of files (%(default)s)"
    )
    parser.set_defaults(run=_build)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show what a data set holds."
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="folder of a data set")
    parser.add_argument("--samples", type=not_negative, default=3, metavar="N", help="records to show (3)")
    parser.add_argument("--verify", action="store_true", help="compare every file with its checksum")
    parser.set_defaults(run=_inspect)


def _build(arguments: argparse.Namespace) -> int:
    started = time.perf_counter()
    with ProgressBar() as progress:
        report = build_dataset(
            arguments.source,
            arguments.out,
            arguments.format,
            text=TextOptions(not arguments.no_clean, arguments.min_length, arguments.max_length),
            escape=arguments.escape,
            skip_bad=arguments.skip_bad,
            overwrite=arguments.overwrite,
            shard_bytes=arguments.shard_mb << 20,
            progress=progress,
        )
    print("\n".join(_describe(report, arguments.out, time.perf_counter() - started)))
    return 0


def _describe(report: BuildReport, out: Path, seconds: float) -> list[str]:
    lines = [
        f"{out}: {report.records:,} records, {report.characters:,} characters, {report.shards} shards",
        f"read {report.lines:,} lines, {report.bytes_read / 1e6:,.1f} MB in {seconds:.1f} s "
        f"({report.bytes_read / 1e6 / seconds:.0f} MB/s)",
    ]
    if report.too_short:
        lines.append(f"left out {report.too_short:,} pieces that were too short")
    if report.bad_lines:
        lines.append(f"left out {report.bad_lines:,} bad lines; the first was {report.first_bad}")
    return lines


def _inspect(arguments: argparse.Namespace) -> int:
    dataset = open_dataset(arguments.dataset)
    if arguments.verify:
        dataset.verify()
    found = inspect_dataset(dataset, arguments.samples)
    print(f"{dataset.name}: {found.records:,} records, {found.characters:,} characters")
    print("characters of a record: " + ", ".join(f"{p} %: {value:,}" for p, value in found.percentiles.items()))
    print("\n".join(histogram_lines(found.histogram)))
    for index, text in found.samples:
        shown = text if len(text) <= _SAMPLE_WIDTH else text[: _SAMPLE_WIDTH - 3] + "..."
        print(f"record {index}: {shown}")
    if arguments.verify:
        print("every file matches its checksum" if hasattr(dataset, "manifest") else "every record can be read")
    return 0
