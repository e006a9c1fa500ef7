"""Makes the recorded table again: the demo model, synthetic 1b and 2b, in every precision, beside every peer there is.

``python -m cpmbee.bench.table`` makes what it measures in a folder of its own and deletes each model when it is done
with it: 2b in fp32 takes 8 GB of disk and of memory. A group whose result is there already is not measured again, so an
interrupted table goes on where it stopped; ``--minutes`` ends it in time. Results, one a group, and the table and
pictures made of all of them go to ``benchmarks/results/table`` (or ``--out``).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cpmbee.bench import plots
from cpmbee.bench.checks import check_workloads, open_subjects
from cpmbee.bench.environment import circumstances, results_folder, shown_command
from cpmbee.bench.peers.protocol import made_once
from cpmbee.bench.plan import Sweep
from cpmbee.bench.records import Result
from cpmbee.bench.report import csv_text, markdown
from cpmbee.bench.run import Settings, run
from cpmbee.bench.synthetic import published_config, write_checkpoint
from cpmbee.export.demo import demo_checkpoint
from cpmbee.export.exporter import export
from cpmbee.export.quantize import Method
from cpmbee.export.weights import PRECISIONS, Precision
from cpmbee.machine import physical_cores
from cpmbee.progress import ProgressBar

DEMO = "demo"
PEERS_OF = {
    "fp32": ("functions", "torch", "torch-compiled"),
    "fp16": ("functions", "torch-bf16", "llama.cpp"),
    "int8": ("matmulnbits", "dynamic-quantize", "llama.cpp", "ctranslate2", "onnxruntime-genai"),
    "int4": ("matmulnbits", "llama.cpp", "onnxruntime-genai"),
}
WIDE: tuple[Precision, ...] = ("int8", "int4")  # measured with long prompts, too; others take minutes for them


@dataclass(frozen=True)
class Group:
    """Models and peers that take turns in one run.

    Attributes:
        size: ``"demo"``, or of the synthetic model.
        precisions: of our folders.
        peers: beside them.
        prompts: tokens that are read.
        answer: tokens that are written.
        batches: requests that run together.
        beams: of the search.
        threads: all cores where none is named.
        rounds: processes for each cell.
        profile: whether our folders are profiled.
        topic: what is varied, where that is not the precision; has a table of its own.
    """

    size: str
    precisions: tuple[Precision, ...]
    peers: tuple[str, ...]
    prompts: tuple[int, ...]
    answer: int = 16
    batches: tuple[int, ...] = (1,)
    beams: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = ()
    rounds: int = 2
    profile: bool = False
    topic: str = ""

    @property
    def table(self) -> str:
        """The table its rows are part of."""
        return f"{self.size}-{self.topic}" if self.topic else self.size

    @property
    def name(self) -> str:
        """Of its result."""
        precisions = self.precisions if len(self.precisions) < len(PRECISIONS) else ["all"]
        return "-".join([self.size, *precisions, *([self.topic] if self.topic else [])])


def groups() -> Iterator[Group]:
    """All of them, the quickest first."""
    every = tuple(dict.fromkeys(peer for peers in PEERS_OF.values() for peer in peers))
    yield Group(DEMO, PRECISIONS, every, (128, 512), answer=32, profile=True)
    for size in ("1b", "2b"):
        for precision in reversed(PRECISIONS):
            wide = precision in WIDE
            yield Group(
                size,
                (precision,),
                PEERS_OF[precision],
                (128, 512) if wide else (128,),
                rounds=3 if wide else 2,
                profile=precision == "int4",
            )
            if size == "2b" and wide:
                yield Group(size, (precision,), ("matmulnbits",), (64,), batches=(1, 8), topic="batch")
                yield Group(size, (precision,), ("matmulnbits",), (64,), beams=(1, 3), topic="beams")
        if size == "1b":
            every_number = tuple(range(1, physical_cores() + 1))
            yield Group(size, WIDE, (), (128, 512, 2048), threads=every_number, topic="threads")


def main() -> None:
    """Measure what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=results_folder() / "table", help="where results go")
    parser.add_argument(
        "--scratch", type=Path, default=Path("bench-models"), help="where models are made (%(default)s)"
    )
    parser.add_argument("--keep", action="store_true", help="do not delete models that were made here")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="groups whose name begins so")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no group after so many")
    parser.add_argument("--attempts", type=int, default=2, help="at a process that others disturb (2)")
    parser.add_argument("--list", action="store_true", help="say which groups there are")
    arguments = parser.parse_args()
    wanted = [group for group in groups() if group.name.startswith(tuple(arguments.only or [""]))]
    if arguments.list:
        print("\n".join(group.name for group in wanted))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    for group in wanted:
        path = arguments.out / f"{group.name}.json"
        if path.exists():
            continue
        if time.monotonic() - start > 60 * arguments.minutes:
            print(f"no time for {group.name}; run again to go on", file=sys.stderr)
            break
        begin = time.monotonic()
        measure(group, arguments.scratch, arguments.attempts, keep=arguments.keep).write(path)
        print(f"{group.name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    write_table(arguments.out)


def measure(group: Group, scratch: Path, attempts: int, *, keep: bool) -> Result:
    """One group: make its models, measure, delete."""
    made = [path for path in (scratch / group.size,) if not path.exists() and group.size != DEMO]
    checkpoint = make_checkpoint(group.size, scratch)
    folders = []
    for precision in group.precisions:
        folder = scratch / f"{group.size}-{precision}"
        if not folder.exists():
            method: Method = "search" if group.size == DEMO else "nearest"
            export(checkpoint, folder, precision, method=method, verify=False)
            made.append(folder)
        folders.append(folder)
    threads = group.threads or (physical_cores(),)
    settings = Settings(
        sweep=Sweep(group.prompts, (group.answer,), group.batches, group.beams, threads, ("cpu",)),
        peers=group.peers,
        rounds=group.rounds,
        repetitions=2,
        attempts=attempts,
        checkpoint=checkpoint,
        requests=checkpoint / "requests.jsonl" if group.size == DEMO else None,
        profile=group.profile,
    )
    found = open_subjects(folders)
    check_workloads(found, list(settings.sweep.workloads()))
    peer_models = scratch / "peers"
    command = shown_command("python -m cpmbee.bench.table", ["--only", group.name])
    try:
        with ProgressBar() as progress:
            return run(found, settings, peer_models, circumstances(command), progress)
    finally:
        if not keep:
            for path in (peer_models, *made[::-1]):
                if path != scratch / group.size:  # the checkpoint is for the next group, too
                    shutil.rmtree(path, ignore_errors=True)


def make_checkpoint(size: str, scratch: Path) -> Path:
    """The bundled demo model, or a synthetic one of a published shape."""
    if size == DEMO:
        scratch.mkdir(parents=True, exist_ok=True)
        return demo_checkpoint()
    return made_once(scratch / size, lambda out: write_checkpoint(published_config(size), out))


def write_table(out: Path) -> None:
    """Table, sheet and pictures of each kind, from all results in ``out``."""
    tables: dict[str, Result] = {}
    for group in groups():
        path = out / f"{group.name}.json"
        if not path.exists():
            continue
        result = Result.read(path)
        if group.table in tables:
            tables[group.table].include(result)
        else:
            tables[group.table] = result
    for name, result in tables.items():
        (out / f"{name}.md").write_text(markdown(result), encoding="utf-8")
        (out / f"{name}.csv").write_text(csv_text(result), encoding="utf-8")
        pictures = out / f"{name}-plots"
        pictures.mkdir(exist_ok=True)
        plots.draw(result, pictures)
    print(f"tables in {out}: {', '.join(f'{name}.md' for name in tables)}")


if __name__ == "__main__":
    main()
