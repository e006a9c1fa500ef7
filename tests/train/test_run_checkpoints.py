"""Checkpoints of a run: one that is half there, coming or going, is none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cpmbee.train import run_checkpoints
from cpmbee.train.processes import Processes
from cpmbee.train.run_checkpoints import RunCheckpoints
from tests.train.training_runs import tiny_model


@pytest.fixture
def checkpoints(tmp_path: Path) -> RunCheckpoints:
    return RunCheckpoints(tmp_path / "checkpoints", Processes(0, 1))


def save(checkpoints: RunCheckpoints, step: int) -> None:
    model = tiny_model()
    checkpoints.save(step, model, torch.optim.AdamW(model.parameters()), {})


def test_pruning_that_is_interrupted_leaves_whole_checkpoints_only(
    checkpoints: RunCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save(checkpoints, step)
    whole = {step: sorted(entry.name for entry in checkpoints.path(step).iterdir()) for step in (1, 2, 3)}

    def remove_half(path: Path, *_: Any, **__: Any) -> None:
        if path.is_dir():
            next(path.glob("*.safetensors")).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", remove_half)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.prune({3})
    assert 3 in checkpoints.steps()
    for step in checkpoints.steps():
        assert sorted(entry.name for entry in checkpoints.path(step).iterdir()) == whole[step]
        checkpoints.read_state(step)
    checkpoints.prune({3})
    assert [entry.name for entry in checkpoints.folder.iterdir()] == ["step-00000003"]


def test_pruning_leaves_what_is_not_its_own(checkpoints: RunCheckpoints) -> None:
    save(checkpoints, 1)
    (checkpoints.folder / ".partial-notes").mkdir()
    (checkpoints.folder / "notes.txt").write_text("mine")
    checkpoints.prune(set())
    assert sorted(entry.name for entry in checkpoints.folder.iterdir()) == [".partial-notes", "notes.txt"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(
    checkpoints: RunCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a power cut finds all of it, or none: its files first, then the name, then the folder of the names."""
    happened: list[tuple[str, str, list[str]]] = []
    sync_folder, sync_entry, rename = run_checkpoints.sync_folder, run_checkpoints.sync_entry, Path.rename

    def note(what: str, path: Path) -> None:
        happened.append((what, path.name, sorted(entry.name for entry in path.iterdir())))

    def noted_sync(path: Path) -> None:
        note("folder", path)
        sync_folder(path)

    def noted_entry(path: Path) -> None:
        note("entry", path)
        sync_entry(path)

    def noted_rename(path: Path, target: Path) -> Path:
        note("rename", path)
        return rename(path, target)

    monkeypatch.setattr(run_checkpoints, "sync_folder", noted_sync)
    monkeypatch.setattr(run_checkpoints, "sync_entry", noted_entry)
    monkeypatch.setattr(Path, "rename", noted_rename)
    save(checkpoints, 7)
    files = sorted(entry.name for entry in checkpoints.path(7).iterdir())
    assert "state.json" in files
    assert happened == [
        ("folder", ".partial-step-00000007", files),
        ("rename", ".partial-step-00000007", files),
        ("entry", "checkpoints", ["step-00000007"]),
    ]


def test_a_checkpoint_of_the_same_step_is_replaced_when_the_new_one_is_complete(checkpoints: RunCheckpoints) -> None:
    save(checkpoints, 1)
    model = tiny_model(seed=5)
    checkpoints.save(1, model, torch.optim.AdamW(model.parameters()), {"mark": 2})
    assert checkpoints.read_state(1)["mark"] == 2
    assert [entry.name for entry in checkpoints.folder.iterdir()] == ["step-00000001"]
