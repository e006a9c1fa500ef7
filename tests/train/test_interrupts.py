"""Ctrl-C and SIGTERM while a model is trained: the step is finished, a checkpoint kept, and nothing is lost."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from cpmbee.cli import main
from cpmbee.model import load_model
from cpmbee.train import run_checkpoints
from cpmbee.train.data.build import build_dataset
from cpmbee.train.interrupts import Interrupts
from cpmbee.train.metrics import read_metrics
from cpmbee.train.processes import Processes
from cpmbee.train.run_checkpoints import RunCheckpoints
from cpmbee.train.step import OptimizerStep
from cpmbee.train.trainer import Trainer
from cpmbee.train.validation import HeldOutLoss
from tests.model.factory import write_checkpoint
from tests.train.task_files import copy_records, write_records
from tests.train.training_runs import LetterSource, run

ALONE = Processes(0, 1)
CPU = torch.device("cpu")
OPTIONS = {"evaluate_every": 3, "checkpoint_every": 3}

SIGNAL_IN_STEP_2 = """
import os, sys
from cpmbee.cli import main
from cpmbee.train.step import OptimizerStep
backward = OptimizerStep._backward
def told(step, *arguments):
    step.taken = getattr(step, "taken", 0) + 1
    if step.taken == 2:
        os.kill(os.getpid(), int(sys.argv[1]))
    return backward(step, *arguments)
OptimizerStep._backward = told
sys.exit(main(sys.argv[2:]))
"""


def at_call(patch: pytest.MonkeyPatch, owner: Any, name: str, number: int, action: Callable[[], None]) -> None:
    """Do something in the middle of a function's n-th call, so to speak."""
    original, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            action()
        return original(*arguments, **options)

    patch.setattr(owner, name, call)


def interrupt(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def steps(folder: Path) -> list[int]:
    return RunCheckpoints(folder / "checkpoints", ALONE).steps()


def curve(folder: Path) -> list[tuple[Any, ...]]:
    fields = ("step", "loss", "task_losses", "learning_rate", "tokens", "padding", "gradient_norm", "evaluation")
    return [tuple(line.get(field) for field in fields) for line in read_metrics(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run that nobody interrupted, and the parameters at its end."""
    folder = tmp_path_factory.mktemp("whole")
    model, _ = run(folder, dropout=0.1, options=OPTIONS)
    return folder, model.state_dict()


@pytest.fixture
def polite(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SIGTERM as the command line treats it."""

    def unwind(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, unwind)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("polite")
@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["SIGINT", "SIGTERM"]
)
@pytest.mark.parametrize(
    ("owner", "name", "call", "last"),
    [
        (OptimizerStep, "_backward", 1, 1),
        (OptimizerStep, "_backward", 5, 5),
        (OptimizerStep, "_backward", 8, 8),
        (torch.optim.AdamW, "step", 2, 2),
        (LetterSource, "batch", 2 + 4, 4),  # the first two are held out
        (HeldOutLoss, "__call__", 1, 3),
        (run_checkpoints, "save", 1, 4),
        (run_checkpoints, "save", 3, 8),
    ],
    ids=["first step", "step", "last step", "optimizer", "data", "evaluation", "checkpoint", "last checkpoint"],
)
def test_an_interrupted_run_keeps_a_checkpoint_and_resumes_bit_for_bit(
    whole: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    raised: type[BaseException],
    owner: Any,
    name: str,
    call: int,
    last: int,
) -> None:
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, call, lambda: interrupt(number))
        with pytest.raises(raised):
            run(tmp_path, dropout=0.1, options=OPTIONS)
    assert signal.getsignal(number) is handler
    assert steps(tmp_path)[-1] == last
    assert [line["step"] for line in read_metrics(tmp_path) if "loss" in line] == list(range(1, last + 1))
    model, _ = run(tmp_path, dropout=0.1, options=OPTIONS, resume=True)
    assert curve(tmp_path) == curve(whole[0])
    assert all(torch.equal(tensor, whole[1][name]) for name, tensor in model.state_dict().items())


def test_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    at_call(monkeypatch, OptimizerStep, "_backward", 2, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert [record.getMessage() for record in caplog.records if "interrupted" in record.getMessage()] == [
        "interrupted: the run ends with this step and a checkpoint; once more ends it at once",
        f"interrupted after step 2 of 8: kept {tmp_path / 'checkpoints' / 'step-00000002'}; --resume goes on from it",
    ]


@pytest.mark.parametrize(
    ("owner", "name"), [(run_checkpoints, "save"), (run_checkpoints, "sync_folder"), (OptimizerStep, "_backward")]
)
def test_a_second_interrupt_ends_the_run_at_once_and_leaves_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    def twice() -> None:
        interrupt()
        interrupt()

    options = {"checkpoint_every": 1, "keep_checkpoints": 9}
    with monkeypatch.context() as patch:
        at_call(patch, owner, name, 3, twice)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, options=options)
    assert steps(tmp_path) == [1, 2]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    assert run(tmp_path, options=options, resume=True)[1].steps == 8


def test_an_interrupt_while_tensors_are_written_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch wraps it in an exception of its own there."""

    def twice() -> None:
        interrupt()
        interrupt()

    at_call(monkeypatch, HuggingFaceStorageWriter, "write_data", 1, twice)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_run_that_keeps_nothing_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    monkeypatch.setattr(Trainer, "_report", lambda self, result, *_: losses.append(result.loss))
    at_call(monkeypatch, OptimizerStep, "_backward", 3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(None)
    assert len(losses) == 2


def test_a_handler_that_only_takes_note_is_called_behind_the_step(
    whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not end the run, so the run goes on."""
    noted: list[list[int]] = []
    at_call(monkeypatch, OptimizerStep, "_backward", 2, interrupt)
    before = signal.signal(signal.SIGINT, lambda number, frame: noted.append(steps(tmp_path)))
    try:
        run(tmp_path, dropout=0.1, options=OPTIONS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert noted == [[2]]
    assert curve(tmp_path) == curve(whole[0])


def test_signals_without_a_handler_in_python_are_left_alone() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with Interrupts():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_interrupt_behind_the_last_step_is_delivered() -> None:
    def context(error: Exception | None) -> None:
        with Interrupts() as interrupts:
            interrupt()
            assert interrupts.agreed(ALONE, CPU) == signal.SIGINT
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt):
        context(None)
    with pytest.raises(ValueError, match="an error of its own"):
        context(ValueError("an error of its own"))


def test_training_in_another_thread_changes_no_handlers() -> None:
    found: list[Any] = []

    def look() -> None:
        with Interrupts():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_the_commands_say_where_to_go_on(tmp_path: Path, number: signal.Signals, status: int) -> None:
    base = write_checkpoint(tmp_path / "base")
    data = write_records(tmp_path / "copy.jsonl", copy_records(9))
    out = tmp_path / "out"
    if number == signal.SIGINT:
        arguments = ["finetune", str(base), str(data), str(out), "--steps", "9", "--threads", "1"]
    else:
        build_dataset(data, tmp_path / "set")
        (tmp_path / "mixture.json").write_text('[{"dataset": "set"}]', encoding="utf-8")
        rows = {"mixture": "mixture.json", "row_length": 64, "batch_rows": 2}
        config = {"model": "base", "data": rows, "training": {"steps": 9}, "threads": 1}
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        arguments = ["pretrain", str(tmp_path / "config.json"), str(out)]
    command = [sys.executable, "-c", SIGNAL_IN_STEP_2, str(int(number)), *arguments]
    stopped = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert stopped.returncode == status, stopped.stderr
    kept = out / "checkpoints" / "step-00000002"
    assert f"interrupted after step 2 of 9: kept {kept}; --resume goes on from it\n" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (out / "model").exists()
    assert main([*arguments, "--resume"]) == 0
    load_model(out / "model")
