"""``cpmbee bench``: how fast, how much memory, how good, compared with what, on this machine."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cpmbee.bench.checks import check_workloads, open_subjects, require_folder
from cpmbee.bench.environment import circumstances, shown_command
from cpmbee.bench.peers.registry import PEERS
from cpmbee.bench.plan import Sweep
from cpmbee.bench.records import RESULT_FILE
from cpmbee.bench.report import csv_text, markdown
from cpmbee.bench.run import Settings, run
from cpmbee.errors import ConfigError
from cpmbee.export.sources import open_source
from cpmbee.export.transcripts import read_requests
from cpmbee.machine import physical_cores
from cpmbee.progress import ProgressBar

TABLE, SHEET = "table.md", "table.csv"
_EPILOG = """\
Lists are separated by commas; every combination of them is measured, each in a process of its own.
Several MODEL folders, of several precisions say, are compared in one run and take turns.

  cpmbee bench MODEL
  cpmbee bench INT4 INT8 --prompt 128,512,2048 --threads 1,2 --peers all --plot
  cpmbee bench compare BEFORE AFTER
"""


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    if argv[:1] == ["compare"]:
        from cpmbee.bench.compare import main as compare_main

        return compare_main(argv[1:])
    parser = _parser()
    arguments = parser.parse_args(argv)
    peers = list(PEERS) if arguments.peers == ["all"] else arguments.peers
    if unknown := [name for name in peers if name not in PEERS]:
        parser.error(f"no peer is called {unknown[0]!r}; there are {', '.join(PEERS)}, or all of them: all")
    sweep = Sweep(
        arguments.prompt, arguments.answer, arguments.batch, arguments.beams, arguments.threads, arguments.device
    )
    found = open_subjects(arguments.models)
    check_workloads(found, list(sweep.workloads()))
    if arguments.quality is not None:
        read_requests(arguments.quality)
    out: Path = arguments.out or Path(time.strftime("bench-%Y%m%d-%H%M%S"))
    _require_free(out, (RESULT_FILE, TABLE, SHEET))
    require_folder(out)
    if arguments.peer_models is not None:
        require_folder(arguments.peer_models)
    if arguments.checkpoint is not None:
        open_source(arguments.checkpoint)
    if arguments.plot:
        from cpmbee.bench import plots  # now: what is missing shows before anything is measured

        _require_free(out, plots.PICTURES)
    settings = Settings(
        sweep=sweep,
        peers=peers,
        rounds=arguments.rounds,
        repetitions=arguments.repetitions,
        attempts=arguments.attempts,
        checkpoint=arguments.checkpoint,
        requests=arguments.quality,
        profile=arguments.profile,
    )
    command = shown_command("cpmbee bench", argv)
    with tempfile.TemporaryDirectory() as temporary, ProgressBar() as progress:
        scratch: Path = arguments.peer_models or Path(temporary)
        result = run(found, settings, scratch, circumstances(command), progress)
    text = markdown(result)
    out.mkdir(parents=True, exist_ok=True)
    result.write(out / RESULT_FILE)
    (out / TABLE).write_text(text, encoding="utf-8")
    (out / SHEET).write_text(csv_text(result), encoding="utf-8")
    print(text)
    print(f"kept in {out}: {RESULT_FILE} (every sample), {TABLE}, {SHEET}")
    if arguments.plot:
        drawn = plots.draw(result, out)
        print(f"drawn in {out}: {', '.join(path.name for path in drawn) or 'nothing, one value of each is no picture'}")
    return 0 if result.cells else 1


def _require_free(out: Path, names: Sequence[str]) -> None:
    """Refuse a folder that has one of the files to be written.

    Raises:
        ConfigError: names the file.
    """
    if there := [name for name in names if (out / name).exists()]:
        raise ConfigError(f"{out / there[0]}: there is a result already; choose another folder with --out")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "cpmbee bench",
        description="Measure speed, memory and quality of model folders, beside other engines.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", type=Path, nargs="+", metavar="MODEL", help="folders that cpmbee export wrote")
    add("--out", type=Path, metavar="FOLDER", help="where results go (./bench-DATE-TIME)")
    group = parser.add_argument_group("what is asked")
    add = group.add_argument
    add("--prompt", type=_numbers, default=[128, 512], metavar="N,...", help="tokens that are read (128,512)")
    add("--answer", type=_numbers, default=[32], metavar="N,...", help="tokens that are written (32)")
    add("--batch", type=_numbers, default=[1], metavar="N,...", help="requests that run together (1)")
    add("--beams", type=_numbers, default=[1], metavar="N,...", help="beams of the search (1)")
    cores = physical_cores()
    add("--threads", type=_numbers, default=[cores], metavar="N,...", help=f"threads (physical cores, here {cores})")
    add("--device", type=_names, default=["cpu"], metavar="NAME,...", help="where models run (cpu)")
    group = parser.add_argument_group("what is measured beside")
    add = group.add_argument
    add(
        "--peers",
        type=_names,
        default=[],
        metavar="NAME,...",
        help=f"all, or some of {', '.join(PEERS)}",
    )
    add("--peer-models", type=Path, metavar="FOLDER", help="keep the models made for peers there, and take them again")
    add("--checkpoint", type=Path, metavar="PATH", help="what MODEL was exported from: PyTorch's weights, fp32 truth")
    add("--quality", type=Path, metavar="FILE", help="JSON Lines of requests, with answers: KL, top-1, right answers")
    add("--profile", action="store_true", help="share of each kind of operator, beside the least time it could take")
    add("--plot", action="store_true", help="draw what the run has data for")
    group = parser.add_argument_group("how carefully")
    add = group.add_argument
    add("--rounds", type=_positive, default=3, metavar="N", help="processes for each row (3)")
    add("--repetitions", type=_positive, default=3, metavar="N", help="in each process, after a warm-up (3)")
    add(
        "--attempts",
        type=_positive,
        default=3,
        metavar="N",
        help="at a process that others disturb (3); 1 never waits",
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def _numbers(text: str) -> Sequence[int]:
    return _without_repeats(text, _positive)


def _names(text: str) -> Sequence[str]:
    return _without_repeats(text, str)


def _without_repeats(text: str, read: Callable[[str], object]) -> list:  # type: ignore[type-arg]
    return list(dict.fromkeys(read(part.strip()) for part in text.split(",")))
