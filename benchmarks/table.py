"""Makes the recorded table again: the demo model, synthetic 1b and 2b, in every precision, beside every peer there is.

``python -m cpmbee.bench.table`` makes what it measures in a folder of its own, each model once, and deletes it when no
later group needs it: 2b in fp32 takes 8 GB of disk and of memory, all that is there at a time 20 GB. A group whose
result is there already is not measured again, so an interrupted table goes on where it stopped; ``--minutes`` ends it
in time, ``--list`` says what there is to measure and about how long it takes. Results, one a group, and the table and
pictures made of all of them go to ``benchmarks/results/table`` (or ``--out``).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from cpmbee.bench import plots
from cpmbee.bench.checks import check_workloads, open_subjects
from cpmbee.bench.environment import circumstances, results_folder, shown_command
from cpmbee.bench.made import NOTE_SUFFIX, code_identity, made_once, remove_made
from cpmbee.bench.records import Result
from cpmbee.bench.report import csv_text, markdown
from cpmbee.bench.run import Settings, run
from cpmbee.bench.synthetic import published_config, write_checkpoint
from cpmbee.bench.table_estimate import estimates
from cpmbee.bench.table_plan import DEMO, Group, groups
from cpmbee.export.demo import demo_checkpoint
from cpmbee.export.exporter import export
from cpmbee.export.quantize import Method
from cpmbee.export.weights import Precision
from cpmbee.progress import ProgressBar

PEER_MODELS = "peers"
REPETITIONS = 2
SETTLED = 0.03  # of two processes; where they differ more, a third one measures


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
    parser.add_argument("--list", action="store_true", help="say which groups are missing and how long they take")
    arguments = parser.parse_args()
    wanted = [group for group in groups() if group.name.startswith(tuple(arguments.only or [""]))]
    missing = [group for group in wanted if not (arguments.out / f"{group.name}.json").exists()]
    if arguments.list:
        print(plan(missing))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    try:
        for index, group in enumerate(missing):
            if time.monotonic() - start > 60 * arguments.minutes:
                print(f"no time for {group.name}; run again to go on", file=sys.stderr)
                break
            begin = time.monotonic()
            measure(group, arguments.scratch, arguments.attempts).write(arguments.out / f"{group.name}.json")
            print(f"{group.name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
            if not arguments.keep:
                delete_models(arguments.scratch, group, missing[index + 1 :])
    finally:
        if not arguments.keep:
            for group in missing:
                delete_models(arguments.scratch, group, [])
    write_table(arguments.out)


def plan(missing: Sequence[Group]) -> str:
    """The groups with their estimated minutes, one a line, and the sum."""
    minutes = [seconds / 60 for seconds in estimates(missing, REPETITIONS)]
    lines = [f"{each:5.1f}  {group.name}" for each, group in zip(minutes, missing, strict=True)]
    return "\n".join([*lines, f"{sum(minutes):5.1f}  minutes, about, on two cores with nothing else to do"])


def measure(group: Group, scratch: Path, attempts: int) -> Result:
    """One group; models that it needs and that are not there are made."""
    checkpoint = make_checkpoint(group.size, scratch)
    folders = [make_folder(group.size, precision, checkpoint, scratch) for precision in group.precisions]
    settings = Settings(
        sweep=group.sweep,
        peers=group.peers,
        rounds=group.rounds,
        repetitions=REPETITIONS,
        attempts=attempts,
        settled=SETTLED,
        checkpoint=checkpoint,
        requests=checkpoint / "requests.jsonl" if group.size == DEMO else None,
        profile=group.profile,
    )
    found = open_subjects(folders)
    check_workloads(found, list(settings.sweep.workloads()))
    command = shown_command("python -m cpmbee.bench.table", ["--only", group.name])
    with ProgressBar() as progress:
        return run(found, settings, scratch / PEER_MODELS, circumstances(command), progress)


def make_checkpoint(size: str, scratch: Path) -> Path:
    """The bundled demo model, or a synthetic one of a published shape."""
    if size == DEMO:
        return demo_checkpoint()
    origin = code_identity("cpmbee.bench.synthetic")
    return made_once(scratch / size, origin, lambda out: write_checkpoint(published_config(size), out))


def make_folder(size: str, precision: Precision, checkpoint: Path, scratch: Path) -> Path:
    """A model folder of ours; nothing is verified, for the tests do that with every precision."""
    method: Method = "search" if size == DEMO else "nearest"
    origin = code_identity("cpmbee.export", "cpmbee.bench.synthetic")
    return made_once(
        scratch / f"{size}-{precision}",
        origin,
        lambda out: export(checkpoint, out, precision, method=method, verify=False),
    )


def delete_models(scratch: Path, done: Group, later: Sequence[Group]) -> None:
    """Delete what a group needed and no later one does."""
    needed = {model for group in later for model in group.models}
    names = [f"{size}-{precision}" for size, precision in done.models - needed]
    if done.size not in {group.size for group in later}:
        names.append(done.size)
    for name in names:
        remove_made(scratch / name)
        for note in (scratch / PEER_MODELS).glob(f"{name}[-.]*{NOTE_SUFFIX}"):
            remove_made(note.with_name(note.name.removesuffix(NOTE_SUFFIX)))


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
