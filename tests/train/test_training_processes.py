"""Runs that are killed, and runs of two processes: each is a command of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpmbee.cli import main
from cpmbee.model import read_lora
from cpmbee.train.metrics import read_metrics
from cpmbee.train.processes import Processes
from cpmbee.train.run_checkpoints import RunCheckpoints
from tests.model.factory import write_checkpoint
from tests.train import training_runs
from tests.train.task_files import copy_records, write_records
from tests.train.training_runs import run

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
OPTIONS = '{"evaluate_every": 3, "checkpoint_every": 2}'


def command(*arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run(
        [sys.executable, *launcher, training_runs.__file__, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def steps(folder: Path) -> list[int]:
    return RunCheckpoints(folder / "checkpoints", Processes(0, 1)).steps()


def curve(folder: Path) -> list[tuple[Any, ...]]:
    """What must not depend on when a run was killed: losses, norms, evaluations, data."""
    fields = ("step", "loss", "task_losses", "learning_rate", "tokens", "padding", "gradient_norm", "evaluation")
    return [tuple(line.get(field) for field in fields) for line in read_metrics(folder)]


def test_a_run_killed_in_the_middle_of_a_step_resumes_bit_for_bit(tmp_path: Path) -> None:
    options = {"evaluate_every": 3, "checkpoint_every": 2}
    run(tmp_path / "whole", dropout=0.1, options=options)
    killed = command(tmp_path / "killed", "--dropout", 0.1, "--options", OPTIONS, "--kill-at", 6)
    assert killed.returncode == -9, killed.stderr
    assert steps(tmp_path / "killed") == [3, 4]
    _, result = run(tmp_path / "killed", dropout=0.1, options=options, resume=True)
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert len(result.losses) == 4


@pytest.mark.parametrize("moment", ["tensors", "rename"])
def test_a_checkpoint_killed_while_it_is_written_never_counts(tmp_path: Path, moment: str) -> None:
    killed = command(tmp_path, "--options", OPTIONS, "--kill-while-saving", 4, moment)
    assert killed.returncode == -9, killed.stderr
    folder = tmp_path / "checkpoints"
    assert steps(tmp_path) == [2, 3]
    assert any(entry.name.startswith(".partial-") for entry in folder.iterdir())
    _, result = run(tmp_path, options={"evaluate_every": 3, "checkpoint_every": 2}, resume=True)
    assert len(result.losses) == 5
    assert sorted(entry.name for entry in folder.iterdir()) == ["step-00000006", "step-00000008"]


def test_two_processes_give_the_losses_of_one_and_share_its_checkpoints(tmp_path: Path) -> None:
    options = {"evaluate_every": 3, "accumulation": 2, "keep_checkpoints": 9, "schedule": "constant"}
    run(tmp_path / "one", rows=5, options=options)
    run(tmp_path / "both", rows=5, options={**options, "steps": 2})
    text = json.dumps({**options, "steps": 6})
    two = command(tmp_path / "both", "--rows", 5, "--options", text, "--resume", launcher=TORCHRUN)
    assert two.returncode == 0, two.stderr
    assert len(list((tmp_path / "both" / "checkpoints" / "step-00000006").glob("*.safetensors"))) == 2
    run(tmp_path / "both", rows=5, options=options, resume=True)

    one, both = ([line for line in read_metrics(tmp_path / name) if "loss" in line] for name in ("one", "both"))
    assert [line["tokens"] for line in one] == [line["tokens"] for line in both]
    for field in ("loss", "gradient_norm", "padding"):
        assert [line[field] for line in both] == pytest.approx([line[field] for line in one], abs=1e-4)
    evaluations = (
        [line["evaluation"]["loss"] for line in read_metrics(tmp_path / name) if line["step"] == 3 and len(line) == 2]
        for name in ("one", "both")
    )
    assert next(evaluations) == pytest.approx(next(evaluations), abs=1e-4)


def test_an_interrupt_of_one_process_ends_all_of_them_at_the_same_step(tmp_path: Path) -> None:
    options = {"evaluate_every": 3}
    stopped = command(tmp_path, "--options", json.dumps(options), "--interrupt-at", 5, launcher=TORCHRUN)
    assert stopped.returncode == 1
    assert "interrupted after step 5 of 8" in stopped.stderr
    assert steps(tmp_path) == [3, 5]
    _, result = run(tmp_path, options=options, resume=True)
    assert len(result.losses) == 3


def test_two_processes_fine_tune_adapters_as_one_does(tmp_path: Path) -> None:
    """Frozen parameters are split and read share by share; adapters, fresh ones here, are the same everywhere.

    The last batch of an epoch has one row only, and the last step has batches without any.
    """
    base = write_checkpoint(tmp_path / "base")
    data = write_records(tmp_path / "copy.jsonl", copy_records(13))
    text = "--lora-rank 2 --epochs 2 --batch-rows 2 --accumulation 3 --row-length 32 --threads 1"
    options = text.split()

    def arguments(out: str) -> list[str]:
        return ["finetune", str(base), str(data), str(tmp_path / out), "--eval", str(data), *options]

    assert main(arguments("one")) == 0
    cpmbee = (sys.executable, "-c", "import sys; from cpmbee.cli import main; sys.exit(main(sys.argv[1:]))")
    command = [sys.executable, *TORCHRUN, "--no-python", *cpmbee, *arguments("two")]
    two = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert two.returncode == 0, two.stderr
    lines = [[line for line in read_metrics(tmp_path / run) if "loss" in line] for run in ("one", "two")]
    assert len(lines[0]) == 4
    assert [line["tokens"] for line in lines[1]] == [line["tokens"] for line in lines[0]]
    for field in ("loss", "gradient_norm"):
        assert [line[field] for line in lines[1]] == pytest.approx([line[field] for line in lines[0]], abs=1e-4)
    one, other = (read_lora(tmp_path / run / "adapter").factors for run in ("one", "two"))
    for name, factors in one.items():
        np.testing.assert_allclose(other[name].b, factors.b, atol=1e-4)
