"""Speed and memory of whole models: prefill, decoding, loading; our kernels beside other ways to run the same weights.

    python -m cpmbee.bench.model_speed NAME LABEL=MODEL...

A folder is measured with the native kernels; ``LABEL=FOLDER:functions`` runs it with ``CPMBEE_NATIVE=0``, on ONNX
Runtime's own operators, and ``LABEL=FILE.gguf`` is a model of llama.cpp (`cpmbee.bench.peers.llama_cpp`). Every cell of
the table is a process of its own. The models take turns at every cell and at every round, and the bandwidth of memory
is measured before each round: ratios of one table are ratios of one run. A cell during which other processes used the
machine is measured again. Numbers are medians over all rounds; the result goes to ``benchmarks/results/NAME.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpmbee.bench.bandwidth import mapped_file, read_bandwidth
from cpmbee.bench.environment import write_result
from cpmbee.bench.model_cell import PROMPT_TOKENS
from cpmbee.bench.peers import llama_cpp
from cpmbee.bench.processes import run_module, undisturbed
from cpmbee.machine import physical_cores

SINGLE = "decode, 1 row"
CELLS = {
    "prefill 128": ("prefill", "128"),
    "prefill 512": ("prefill", "512"),
    "prefill 2048": ("prefill", "2048"),
    SINGLE: ("decode", "1", "1"),
    "decode, beam 3": ("decode", "1", "3"),
    "decode, 8 rows": ("decode", "8", "1"),
    "load": ("load",),
}
ANSWERS = {SINGLE: 1, "decode, beam 3": 1, "decode, 8 rows": 8}  # that grow by a token in a step
NATIVE, FUNCTIONS, LLAMA = "native", "functions", "llama.cpp"  # ways to run a model


@dataclass
class Subject:
    """A model, how it is run, and what was measured so far.

    Attributes:
        label: column of the table.
        path: the model's folder or file.
        way: ``"native"``, ``"functions"`` or ``"llama.cpp"``.
        seconds: of each cell, all rounds; for "load", until the first token.
        disturbance: for each cell, the largest share of the machine that others took during a round.
        peak_anonymous: bytes of memory of its own at most, for each cell.
        peak_resident: the same with mapped files.
    """

    label: str
    path: Path
    way: str
    seconds: dict[str, list[float]] = field(default_factory=dict)
    disturbance: dict[str, float] = field(default_factory=dict)
    peak_anonymous: dict[str, int] = field(default_factory=dict)
    peak_resident: dict[str, int] = field(default_factory=dict)

    @property
    def weight_file(self) -> Path:
        """The file with the weights."""
        return self.path if self.way == LLAMA else self.path / "model.onnx.data"

    @property
    def weight_bytes(self) -> int:
        """Bytes that a decoding step reads: all of the data file, for the embedding is the output head as well."""
        return self.weight_file.stat().st_size

    def median(self, cell: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[cell])


def main() -> None:
    """Measure, print the table, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the result")
    parser.add_argument("subjects", nargs="+", metavar="LABEL=MODEL[:functions]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", help="only cells that begin like this; may be given several times")
    parser.add_argument("--attempts", type=int, default=5, help="at a cell, as long as others disturb it")
    parser.add_argument("--note", help="kept with the result")
    arguments = parser.parse_args()
    cells = [cell for cell in CELLS if cell.startswith(tuple(arguments.only or [""]))]
    subjects = [subject(text) for text in arguments.subjects]
    threads = physical_cores()
    bandwidth: list[float] = []
    file_bandwidth: list[float] = []
    for _ in range(arguments.rounds):
        memory, file = undisturbed(lambda: bandwidths(subjects[0], threads), arguments.attempts)[0]
        bandwidth.append(memory)
        file_bandwidth.append(file)
        for cell in cells:
            for each in subjects:
                measure(each, cell, arguments.attempts)
    limit = statistics.median(bandwidth)
    print(table(subjects, cells, limit))
    mapped = statistics.median(file_bandwidth)
    print(f"\nReads with {threads} threads: memory {limit / 1e9:.1f} GB/s, mapped file {mapped / 1e9:.1f} GB/s.")
    payload: dict[str, Any] = {
        "threads": threads,
        "rounds": arguments.rounds,
        "read_bandwidth_gb_s": [round(value / 1e9, 2) for value in bandwidth],
        "mapped_file_bandwidth_gb_s": [round(value / 1e9, 2) for value in file_bandwidth],
        "subjects": {each.label: record(each, limit) for each in subjects},
    }
    if arguments.note:
        payload["note"] = arguments.note
    print(f"kept in {write_result(arguments.name, payload)}")


def subject(text: str) -> Subject:
    """A subject as the command line names it."""
    label, separator, model = text.partition("=")
    name, _, way = model.partition(":")
    if not separator or way not in ("", FUNCTIONS):
        raise SystemExit(f"{text}: expected LABEL=MODEL or LABEL=FOLDER:{FUNCTIONS}")
    path = Path(name).resolve()
    return Subject(label, path, LLAMA if path.suffix == ".gguf" else way or NATIVE)


def measure(each: Subject, cell: str, attempts: int) -> None:
    """Run one cell once, if it exists for this subject; again, if others disturbed it."""
    kind, *numbers = CELLS[cell]
    if each.way == LLAMA:
        if kind != "prefill" and cell != SINGLE:
            return
        prompt, depth = (int(numbers[0]), 0) if kind == "prefill" else (0, PROMPT_TOKENS)
        seconds, others = undisturbed(lambda: llama_cpp.seconds(each.path, prompt, depth), attempts)
    else:
        environment = {"CPMBEE_NATIVE": "0"} if each.way == FUNCTIONS else {}
        command = [str(each.path), kind, *numbers]
        outcome, others = undisturbed(lambda: run_module("cpmbee.bench.model_cell", command, environment), attempts)
        seconds = [outcome.value["first token"]] if kind == "load" else outcome.value
        _raise_to(each.peak_anonymous, cell, outcome.peak_anonymous)
        _raise_to(each.peak_resident, cell, outcome.peak_resident)
    each.seconds.setdefault(cell, []).extend(seconds)
    _raise_to(each.disturbance, cell, round(others, 3))


def _raise_to(largest: dict[str, Any], cell: str, value: float | None) -> None:
    if value is not None:
        largest[cell] = max(value, largest.get(cell, 0))


def bandwidths(each: Subject, threads: int) -> tuple[float, float]:
    """Bytes per second that can be read of ordinary memory, and of the weights' mapped file."""
    file = mapped_file(each.weight_file)
    return read_bandwidth(threads), read_bandwidth(threads, file)


def table(subjects: list[Subject], cells: list[str], limit: float) -> str:
    """All cells as Markdown."""
    lines = ["| work | " + " | ".join(each.label for each in subjects) + " |", "|---" + "|---:" * len(subjects) + "|"]
    for cell in cells:
        lines.append(f"| {cell} | " + " | ".join(describe(each, cell, limit) for each in subjects) + " |")
    for name, peaks in (("peak memory of its own", "peak_anonymous"), ("peak memory with files", "peak_resident")):
        values = [max(getattr(each, peaks).values(), default=0) for each in subjects]
        lines.append(f"| {name} | " + " | ".join(f"{value / 1e9:.2f} GB" if value else "" for value in values) + " |")
    lines.append("| weights | " + " | ".join(f"{each.weight_bytes / 1e9:.2f} GB" for each in subjects) + " |")
    return "\n".join(lines)


def describe(each: Subject, cell: str, limit: float) -> str:
    """One cell as text."""
    if cell not in each.seconds:
        return ""
    seconds = each.median(cell)
    kind, *numbers = CELLS[cell]
    if kind == "load":
        return f"{seconds:.2f} s"
    if kind == "prefill":
        return f"{int(numbers[0]) / seconds:.1f} tok/s"
    text = f"{seconds * 1e3:.1f} ms, {ANSWERS[cell] / seconds:.1f} tok/s"
    if cell == SINGLE:
        rate = each.weight_bytes / seconds
        text += f", {rate / 1e9:.1f} GB/s = {rate / limit:.0%}"
    return text


def record(each: Subject, limit: float) -> dict[str, Any]:
    """A subject's numbers for the result file."""
    manifest = each.path / "engine.json"
    about = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else llama_cpp.version()
    return {
        "model": each.path.name,
        "way": each.way,
        "about": about.get("precision", about),
        "weight_bytes": each.weight_bytes,
        "table": {cell: describe(each, cell, limit) for cell in each.seconds},
        "median_seconds": {cell: round(each.median(cell), 6) for cell in each.seconds},
        "spread_seconds": {
            cell: [round(min(values), 6), round(max(values), 6)] for cell, values in each.seconds.items()
        },
        "disturbed_by_others": each.disturbance,
        "peak_anonymous_bytes": each.peak_anonymous,
        "peak_resident_bytes": each.peak_resident,
    }


if __name__ == "__main__":
    main()
