"""A disk that is full while a model is trained: one line that names the file, and everything written before stays."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from cpmbee.errors import CheckpointError
from cpmbee.train import run_checkpoints
from cpmbee.train.event_file import EventFile
from cpmbee.train.metrics import MetricsLog, StepMetrics, read_metrics
from tests.model.factory import write_checkpoint
from tests.train.task_files import copy_records, write_records
from tests.train.test_interrupts import curve
from tests.train.training_runs import run

WITH_SMALL_FILES = """
import resource, sys
from cpmbee.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Path, "mkdir"),
        (HuggingFaceStorageWriter, "write_data"),
        (Path, "write_text"),
        (run_checkpoints, "sync_folder"),
        (Path, "rename"),
    ],
    ids=["folder", "tensors", "state", "sync", "rename"],
)
def test_a_checkpoint_that_finds_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    options = {"checkpoint_every": 2, "evaluate_every": 3}
    run(tmp_path / "whole", options=options)
    out = tmp_path / "out"
    original = getattr(owner, name)

    def full_at_step_3(place: Any, *arguments: Any, **options: Any) -> Any:
        if "step-00000003" in str(getattr(place, "path", place)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(place, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full_at_step_3)
        with pytest.raises(CheckpointError) as caught:
            run(out, options=options)
    refused = out / "checkpoints" / "step-00000003"
    assert (
        str(caught.value) == f"{refused}: cannot be written (No space left on device); checkpoints before it are kept"
    )
    assert [entry.name for entry in (out / "checkpoints").iterdir()] == ["step-00000002"]
    run(out, options=options, resume=True)
    assert curve(out) == curve(tmp_path / "whole")


def step(number: int) -> StepMetrics:
    return StepMetrics(number, 1.5, {"all": 1.5}, 0.1, 10, 5.0, 0.2, 0.7, 2.0)


def test_a_record_that_finds_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    log.step(step(1))
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr(log, "_file", full)
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: cannot be written \(No space left on device\)"):
            log.step(step(2))
        log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]


def test_tensorboard_that_finds_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(EventFile, "add", refuse)
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    with pytest.raises(CheckpointError, match=r"tensorboard: cannot be written \(No space left on device\)"):
        log.evaluation(1, {"loss": 1.0})
    log.close()


def test_tensorboard_reads_what_was_recorded_and_forgets_what_was_done_anew(tmp_path: Path) -> None:
    """At once: nobody has closed the second file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = MetricsLog(tmp_path, 0, tensorboard=True)
    for number in (1, 2, 3):
        first.step(step(number))
    first.close()
    second = MetricsLog(tmp_path, 2, tensorboard=True)
    second.step(step(3))
    second.evaluation(3, {"loss": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.5), (2, 1.5), (3, 1.5)]
    assert [event.value for event in events.Scalars("evaluation/loss")] == [0.25]
    assert "tasks/all" in events.Tags()["scalars"]
    second.close()


def test_every_step_is_in_the_record_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0, tensorboard=False)
    for number in (1, 2):
        log.step(step(number))
        assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, number + 1))
    log.close()


@pytest.mark.parametrize(("size", "file"), [(200, "metrics.jsonl"), (5000, "checkpoints/step-00000001")])
def test_the_command_says_it_in_one_line(tmp_path: Path, size: int, file: str) -> None:
    """Files may not grow beyond a size here, which is what a full disk is like."""
    base = write_checkpoint(tmp_path / "base")
    data = write_records(tmp_path / "copy.jsonl", copy_records(4))
    arguments = ["finetune", base, data, tmp_path / "out", "--steps", "3", "--checkpoint-every", "1", "--threads", "1"]
    command = [sys.executable, "-c", WITH_SMALL_FILES, str(size), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"cpmbee: {tmp_path / 'out' / file}: cannot be written (File too")
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("checkpoints/*"))
