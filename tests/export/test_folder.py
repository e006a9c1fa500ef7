"""All or nothing: whatever interrupts an export, its target is what it was before or the new model."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpmbee.errors import ExportError
from cpmbee.export.folder import require_space, staged_folder


def write_model(target: Path, content: str, overwrite: bool = False) -> None:
    with staged_folder(target, overwrite) as staging:
        (staging / "model.onnx").write_text(content)
        (staging / "engine.json").write_text(json.dumps({"format": "cpmbee-onnx", "files": {"model.onnx": {}}}))


def entries(parent: Path) -> list[str]:
    return sorted(entry.name for entry in parent.iterdir())


def test_target_appears_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with staged_folder(target, overwrite=False) as staging:
        (staging / "file").write_text("x")
        assert not target.exists()
        assert staging.parent == target.parent  # one file system, so that the rename is atomic
    assert (target / "file").read_text() == "x"
    assert entries(target.parent) == ["model"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_exception_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def interrupted() -> None:
        with staged_folder(tmp_path / "model", overwrite=False) as staging:
            (staging / "file").write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert entries(tmp_path) == []


def test_exception_leaves_the_model_that_was_there(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "old")
    with pytest.raises(ValueError), staged_folder(tmp_path / "model", overwrite=True):
        raise ValueError
    assert (tmp_path / "model" / "model.onnx").read_text() == "old"
    assert entries(tmp_path) == ["model"]


def test_overwrite_replaces_a_model(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "old")
    with pytest.raises(ExportError, match="already exists"):
        write_model(tmp_path / "model", "new")
    write_model(tmp_path / "model", "new", overwrite=True)
    assert (tmp_path / "model" / "model.onnx").read_text() == "new"
    assert entries(tmp_path) == ["model"]


def test_empty_folder_is_a_target(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_model(tmp_path / "model", "new")
    assert (tmp_path / "model" / "model.onnx").read_text() == "new"


def test_foreign_folder_is_never_overwritten(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match="not a folder that an export wrote"):
        write_model(home, "new", overwrite=True)
    assert entries(home) == ["thesis.tex"]


def test_folder_whose_manifest_cannot_be_read_is_never_overwritten(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "old")
    (tmp_path / "model" / "engine.json").write_text("[" * 100_000)
    with pytest.raises(ExportError, match="not a folder that an export wrote"):
        write_model(tmp_path / "model", "new", overwrite=True)


def test_foreign_file_in_a_model_folder_is_not_lost(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "old")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"notes\.txt"):
        write_model(tmp_path / "model", "new", overwrite=True)
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_file_is_not_a_target(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("x")
    with pytest.raises(ExportError, match="is a file"):
        write_model(tmp_path / "model", "new", overwrite=True)


def test_target_below_a_file_is_an_export_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="cannot be written"):
        write_model(tmp_path / "file" / "model", "new")


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match="No space left on device"),
        staged_folder(tmp_path / "model", overwrite=False),
    ):
        raise OSError(28, "No space left on device")
    assert entries(tmp_path) == []


def test_missing_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    require_space(tmp_path, 1)
    with pytest.raises(ExportError, match="GB"):
        require_space(tmp_path, 1 << 60)


def test_killed_export_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    process = _start_export(tmp_path / "model")
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert [name.startswith(".model.writing-") for name in entries(tmp_path)] == [True]  # no target, one leftover
    write_model(tmp_path / "model", "new")
    assert entries(tmp_path) == ["model"]


def test_running_export_is_left_alone(tmp_path: Path) -> None:
    process = _start_export(tmp_path / "model")
    try:
        write_model(tmp_path / "model", "new")
        assert len(entries(tmp_path)) == 2
    finally:
        process.kill()
        process.wait()


def test_leftover_of_another_target_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".other.writing-0a1b2c3d").mkdir()
    write_model(tmp_path / "model", "new")
    assert entries(tmp_path) == [".other.writing-0a1b2c3d", "model"]


def _start_export(target: Path) -> subprocess.Popen[bytes]:
    """A process that is in the middle of an export."""
    code = f"""
import time
from pathlib import Path
from cpmbee.export.folder import staged_folder
with staged_folder(Path({str(target)!r}), False) as staging:
    (staging / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    time.sleep(0.01)
    return process
