"""Kill commands at random moments while they replace something, and see that what they replace still opens.

    python -m tests.killed 200

Children are forked from a process that has run the command once, so that their time is spent where it matters. Half of
them are killed anywhere in their run, half between the moment when the new folder is written and the end.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from cpmbee import staging
from cpmbee.cli import main
from cpmbee.folder import open_folder
from cpmbee.model import open_checkpoint
from cpmbee.model.lora import read_lora
from cpmbee.model.lora_saving import save_lora
from cpmbee.train.data.build import build_dataset
from cpmbee.train.data.opening import open_dataset
from cpmbee.train.lora import LoraConfig, add_adapters, delta_of
from cpmbee.train.processes import Processes
from cpmbee.train.run_checkpoints import RunCheckpoints
from tests.model.factory import random_model, write_checkpoint

TRAINING = ["--row-length", "64", "--batch-rows", "1", "--checkpoint-every", "1", "--threads", "1", "--warmup", "0"]


@dataclass(frozen=True)
class Target:
    """A command that replaces something.

    Attributes:
        first: arguments that make the old one in the folder of their argument.
        again: arguments that replace it.
        opened: opens what is in the folder, all of it, and gives a value that tells the old one from the new one.
    """

    first: Callable[[Path], list[str]]
    again: Callable[[Path], list[str]]
    opened: Callable[[Path], object]


def targets(given: Path) -> dict[str, Target]:
    """Every kind of command, with what it needs in the folder ``given``."""
    for seed in (1, 2):
        write_checkpoint(given / f"base-{seed}", random_model(seed=seed))
        (given / f"text-{seed}.txt").write_text(f"line of text {seed}\n" * 20_000, encoding="utf-8")
        model = random_model(seed=seed)
        add_adapters(model, LoraConfig(2), seed)
        torch.nn.init.normal_(next(p for name, p in model.named_parameters() if name.endswith("lora_B")))
        save_lora(delta_of(model), given / f"delta-{seed}")
    records = [{"input": letter, "<ans>": letter} for letter in "abcdefgh"]
    (given / "records.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    build_dataset(given / "records.jsonl", given / "data")
    (given / "mixture.json").write_text('[{"dataset": "data"}]', encoding="utf-8")
    config = {
        "model": "base-1",
        "data": {"mixture": "mixture.json", "row_length": 64, "batch_rows": 1},
        "training": {"steps": 1, "checkpoint_every": 1, "warmup": 0},
        "threads": 1,
    }
    (given / "pretrain.json").write_text(json.dumps(config), encoding="utf-8")

    def paths(*names: str) -> list[str]:
        return [str(given / name) for name in names]

    finetune = lambda out: ["finetune", *paths("base-1", "records.jsonl"), str(out), *TRAINING]  # noqa: E731
    pretrain = lambda out: ["pretrain", *paths("pretrain.json"), str(out)]  # noqa: E731
    return {
        "export": Target(
            lambda out: ["export", *paths("base-1"), str(out), "--no-verify"],
            lambda out: ["export", *paths("base-2"), str(out), "--no-verify", "--overwrite"],
            lambda out: open_folder(out, verify_hashes=True).source_sha256,
        ),
        "merge": Target(
            lambda out: ["merge", *paths("base-1", "delta-1"), str(out)],
            lambda out: ["merge", *paths("base-1", "delta-2"), str(out), "--overwrite"],
            _weights,
        ),
        "data build": Target(
            lambda out: ["data", "build", *paths("text-1.txt"), str(out)],
            lambda out: ["data", "build", *paths("text-2.txt"), str(out), "--overwrite"],
            _records,
        ),
        "finetune": Target(
            lambda out: [*finetune(out), "--steps", "1"],
            lambda out: [*finetune(out), "--steps", "3", "--resume"],
            _run,
        ),
        "finetune, LoRA": Target(
            lambda out: [*finetune(out), "--steps", "1", "--lora-rank", "2"],
            lambda out: [*finetune(out), "--steps", "3", "--lora-rank", "2", "--resume"],
            _lora_run,
        ),
        "pretrain": Target(
            pretrain,
            lambda out: [*pretrain(out), "--resume", "--set", "training.steps=3"],
            _run,
        ),
    }


def killed(target: Target, kills: int, folder: Path, seed: int = 0) -> Counter[str]:
    """Kill a command until so many kills have come before its end, each over a copy of the same old folder.

    Returns:
        How often ``old`` and ``new`` was found after a kill, and that kills came ``too late``.

    Raises:
        CpmBeeError: what was there could not be opened.
        RuntimeError: a command failed, or something else was found.
    """
    rng = random.Random(seed)
    old = folder / "old"
    with _quiet():
        _expect(main(target.first(old)))  # here: what is imported late is imported now
    new, *others = (folder / f"new-{number}" for number in range(3))
    lasted = [_seconds(target, old, each) for each in (new, *others)]
    seconds = {moment: statistics.median(each[moment] for each in lasted) for moment in ("anywhere", "publishing")}
    values = {"old": target.opened(old), "new": target.opened(new)}
    found: Counter[str] = Counter()
    while found["old"] + found["new"] < kills:
        number = sum(found.values())
        moment = ("anywhere", "publishing")[number % 2]
        out = folder / f"{number}" / "out"
        shutil.copytree(old, out)
        child = _Child(target.again(out))
        if moment == "publishing":
            child.wait_for_publishing()
        time.sleep(rng.uniform(0, seconds[moment]))
        running = child.kill()
        value = target.opened(out)
        if value not in values.values():
            raise RuntimeError(f"{out}: neither the old one nor the new one")
        found[("new" if value == values["new"] else "old") if running else "too late"] += 1
        shutil.rmtree(out.parent)
    return found


def _seconds(target: Target, old: Path, out: Path) -> dict[str, float]:
    """How long the command takes that replaces a copy of the old folder, and the last part of it."""
    shutil.copytree(old, out)
    child = _Child(target.again(out))
    child.wait_for_publishing()
    published = time.monotonic()
    _expect(child.wait())
    return {"anywhere": time.monotonic() - child.started, "publishing": time.monotonic() - published}


class _Child:
    """A forked process that runs a command; it says when the new folder is written and is to be published."""

    def __init__(self, arguments: list[str]) -> None:
        self._pipe, end = os.pipe()
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                with _quiet():
                    _tell_when_publishing(end)
                    code = main(arguments)
            finally:
                os._exit(code)
        os.close(end)

    def wait_for_publishing(self) -> None:
        os.read(self._pipe, 1)

    def wait(self) -> int:
        os.close(self._pipe)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> bool:
        """Whether it was still running."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable()
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
    logging.disable(logging.NOTSET)


def _tell_when_publishing(pipe: int) -> None:
    sync = staging.sync_folder

    def telling(folder: Path) -> None:
        os.write(pipe, b"x")
        sync(folder)

    staging.sync_folder = telling  # type: ignore[attr-defined]


def _expect(code: int) -> None:
    if code != 0:
        raise RuntimeError(f"the command ended with {code}")


def _weights(folder: Path) -> object:
    checkpoint = open_checkpoint(folder)
    return tuple(checkpoint.read(name).tobytes() for name in checkpoint.names())


def _records(folder: Path) -> object:
    records = open_dataset(folder)
    records.verify()
    return (len(records), str(records.read(0)))


def _run(folder: Path) -> object:
    _resumable(folder)
    return _weights(folder / "model")


def _lora_run(folder: Path) -> object:
    """The adapters of a run are two folders, replaced one after the other: the first one tells."""
    _resumable(folder)
    deltas = [read_lora(folder / name) for name in ("adapter", "delta")]
    return tuple(factors.b.tobytes() for factors in deltas[1].factors.values())


def _resumable(folder: Path) -> None:
    checkpoints = RunCheckpoints(folder / "checkpoints", Processes.current())
    checkpoints.read_state(checkpoints.steps()[-1])


def report(kills: int) -> None:
    """Kill every command equally often, and print what was found."""
    torch.set_num_threads(1)
    print(f"{'command':<16} {'kills':>6} {'old':>5} {'new':>5} {'too late':>9} {'s':>6}")
    with tempfile.TemporaryDirectory() as temporary:
        given = Path(temporary)
        commands = targets(given)
        for name, target in commands.items():
            started = time.monotonic()
            found = killed(target, -(-kills // len(commands)), given / "runs" / name)
            seconds = time.monotonic() - started
            total = found["old"] + found["new"]
            print(f"{name:<16} {total:>6} {found['old']:>5} {found['new']:>5} {found['too late']:>9} {seconds:>6.0f}")
            sys.stdout.flush()
            shutil.rmtree(given / "runs" / name)


if __name__ == "__main__":
    report(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
