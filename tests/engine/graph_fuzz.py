"""Graphs that were changed in hostile ways, in folders whose hashes are right: each is refused in a line, or runs.

``python -m tests.engine.graph_fuzz 5000 --seed 0`` tries that many in worker processes and prints what became of them.
It ends with status 1 where one was a signal, a hang, or an exception that is not ours; ``--keep FOLDER`` keeps those.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Literal, get_args

from cpmbee.cache_types import CacheType
from cpmbee.export.weights import Precision
from tests.engine.graph_changes import mutated

TIME_LIMIT = 5.0  # seconds of the processor for looking at a graph, loading and running it
PATIENCE = 60.0  # seconds until an answer has to come, on a machine that others use, too
KINDS: tuple[tuple[Precision, CacheType], ...] = (
    ("fp32", "fp32"),
    ("fp16", "fp16"),
    ("int8", "fp16"),
    ("int4", "int8"),
)

Outcome = Literal["refused", "ran", "raised", "signal", "hang"]
BAD: tuple[Outcome, ...] = ("raised", "signal", "hang")


class Worker:
    """A process that opens and runs one folder after the other; begun anew where one of them ends it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def tried(self, folder: Path) -> tuple[Outcome, str]:
        """What became of a folder, and the line that says why."""
        if self._process is None:
            command = [sys.executable, "-m", "tests.engine.graph_fuzz", "--worker"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._answer(PATIENCE)  # imports
        assert self._process.stdin is not None
        self._process.stdin.write(f"{folder}\n")
        self._process.stdin.flush()
        answer = self._answer(PATIENCE)
        if answer:
            seconds, outcome, message = answer.rstrip("\n").split(" ", 2)
            assert outcome in get_args(Outcome)
            if float(seconds) > TIME_LIMIT:
                return "hang", f"{seconds} s: {outcome} {message}"
            return outcome, message  # type: ignore[return-value]
        process, self._process = self._process, None
        hangs = answer is None
        if hangs:
            process.kill()
        return ("hang", "") if hangs else ("signal", str(process.wait()))

    def _answer(self, seconds: float) -> str | None:
        """A line; empty where the process has ended, None where it does not come in time."""
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline() if ready else None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.communicate()
            self._process = None


def work() -> None:
    """What the process does: reads folders, writes outcomes."""
    import cpmbee

    requests = [{"input": "ab", "<ans>": ""}, {"input": "abc", "<ans>": ""}]
    print("ready", flush=True)
    for line in sys.stdin:
        begin = time.process_time()
        try:
            for native in (True, False):
                engine = cpmbee.Engine.from_pretrained(line.rstrip("\n"), num_threads=1, cache_tokens=99, native=native)
                engine.generate(requests, max_new_tokens=2, beam_size=2)
                engine.generate(requests[0], max_new_tokens=2)
            answer = "ran "
        except cpmbee.CpmBeeError as error:
            one_line = "\n" not in str(error) and len(str(error)) <= 500
            answer = f"refused {error}" if one_line else f"raised {str(error)[:500]!r}"
        except Exception as error:
            answer = f"raised {error!r}"
        print(f"{time.process_time() - begin:.2f}", " ".join(answer.splitlines()), flush=True)


def make_folders(root: Path) -> list[Path]:
    """Exports of a small model, one of each kind."""
    from cpmbee.export.exporter import export
    from tests.model.factory import write_checkpoint

    checkpoint = write_checkpoint(root / "checkpoint")
    for precision, cache in KINDS:
        export(checkpoint, root / precision, precision, cache=cache, block_size=32, verify=False)
    return [root / precision for precision, _ in KINDS]


def put_graph(folder: Path, content: bytes) -> None:
    """Exchange a folder's graph, and its entry in the manifest."""
    (folder / "model.onnx").write_bytes(content)
    manifest = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
    manifest["files"]["model.onnx"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "engine.json").write_text(json.dumps(manifest), encoding="utf-8")


def fuzz(count: int, seed: int, root: Path, keep: Path | None = None) -> tuple[Counter[Outcome], list[str]]:
    """Try changed graphs.

    Args:
        count: of them.
        seed: of the changes.
        root: an empty folder.
        keep: where graphs go whose outcome is bad.

    Returns:
        How often each outcome was, and a line for each bad one.
    """
    rng = random.Random(seed)
    folders = make_folders(root)
    originals = [(folder / "model.onnx").read_bytes() for folder in folders]
    worker = Worker()
    outcomes: Counter[Outcome] = Counter()
    bad = []
    for number in range(count):
        kind = number % len(folders)
        is_original = number < len(folders)
        content = originals[kind] if is_original else mutated(originals[kind], rng)
        put_graph(folders[kind], content)
        outcome, message = worker.tried(folders[kind])
        outcomes[outcome] += 1
        if outcome in BAD or (is_original and outcome != "ran"):
            bad.append(f"{number} ({folders[kind].name}): {outcome} {message}")
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{number}-{folders[kind].name}.onnx").write_bytes(content)
    worker.close()
    return outcomes, bad


def main() -> int:
    """Fuzz as the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where bad graphs go")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return 0
    with tempfile.TemporaryDirectory() as root:
        outcomes, bad = fuzz(arguments.count, arguments.seed, Path(root), arguments.keep)
    print(", ".join(f"{number} {outcome}" for outcome, number in outcomes.most_common()))
    print("\n".join(bad), end="\n" if bad else "")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
