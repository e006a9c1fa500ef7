"""Building a data set from a large text: speed, and memory that does not grow with the text.

Run ``python -m cpmbee.bench.data_build``. The text is made here, from the lines of CCPM where the development data lies
(``CPMBEE_SHARED``), else from a built-in paragraph; it is built by ``cpmbee data build`` in a process of its own, cut
into pieces of at most 512 characters, then read back and verified.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from cpmbee.bench import text
from cpmbee.bench.environment import SHARED, write_result
from cpmbee.bench.processes import run_module
from cpmbee.train.data import TextOptions, build_dataset, open_dataset

LINES = 2000  # different lines of the text; enough that nothing is repeated within a record
SENTENCES = (1, 40)  # of a text
PIECE = 512
CHILD = "--build"  # the process that is watched: builds IN OUT


def main() -> None:
    """Measure, print a Markdown table and keep the result."""
    if sys.argv[1:2] == [CHILD]:
        build(*map(Path, sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000], help="sizes of the text")
    parser.add_argument("--folder", type=Path, help="where to write text and data sets (a temporary folder)")
    parser.add_argument("--no-write", action="store_true", help="do not keep the result")
    arguments = parser.parse_args()
    results = []
    print("| text | build | peak memory | records | verify | random reads |\n|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for megabytes in arguments.megabytes:
            result = measure(Path(folder), megabytes)
            results.append(result)
            print(
                f"| {megabytes:,} MB | {result['build_mb_per_s']:.0f} MB/s | {result['peak_resident_mb']:.0f} MB "
                f"| {result['records']:,} | {result['verify_mb_per_s']:,.0f} MB/s | {result['reads_per_s']:,.0f}/s |",
                flush=True,
            )
    if not arguments.no_write:
        write_result("data_build", {"piece_characters": PIECE, "sizes": results})


def build(source: Path, out: Path) -> None:
    """Build, print the seconds."""
    started = time.perf_counter()
    build_dataset(source, out, "text", text=TextOptions(max_length=PIECE))
    print(json.dumps(time.perf_counter() - started))


def measure(folder: Path, megabytes: int) -> dict[str, Any]:
    """Build, verify and read one size."""
    source, out = folder / "text.txt", folder / "out"
    size = write_text(source, megabytes * 1_000_000)
    built = run_module("cpmbee.bench.data_build", [CHILD, str(source), str(out)])
    dataset = open_dataset(out)
    started = time.perf_counter()
    dataset.verify()
    verified = time.perf_counter() - started
    stored = sum(file.stat().st_size for file in out.iterdir())
    chosen = np.random.default_rng(1).integers(0, len(dataset), 20_000).tolist()
    started = time.perf_counter()
    for index in chosen:
        dataset.read(index)
    read = time.perf_counter() - started
    shutil.rmtree(out)
    return {
        "text_mb": size / 1e6,
        "build_s": built.value,
        "build_mb_per_s": size / 1e6 / built.value,
        "peak_resident_mb": (built.memory.resident or 0) / 1e6,
        "records": len(dataset),
        "stored_mb": stored / 1e6,
        "verify_mb_per_s": stored / 1e6 / verified,
        "reads_per_s": len(chosen) / read,
    }


def write_text(path: Path, size: int) -> int:
    """Write texts, one a line, line breaks escaped; returns the bytes written."""
    rng = np.random.default_rng(0)
    sentences = _sentences()
    written = 0
    with path.open("wb") as file:
        while written < size:
            counts = rng.integers(*SENTENCES, 1000)
            chosen = rng.integers(0, len(sentences), int(counts.sum())).tolist()
            breaks = np.cumsum(counts).tolist()
            lines = [chosen[start:stop] for start, stop in zip([0, *breaks[:-1]], breaks, strict=True)]
            content = "\n".join("\\n".join(sentences[i] for i in line) for line in lines) + "\n"
            written += file.write(content.encode())
    return written


def _sentences() -> list[str]:
    examples = SHARED / "data" / "ccpm" / "train.jsonl"
    if not examples.exists():
        return [text.PARAGRAPH[i:] for i in range(40)]
    return [text.ccpm_request(line)["input"] for line in text.read_lines(examples)[:LINES]]


if __name__ == "__main__":
    main()
