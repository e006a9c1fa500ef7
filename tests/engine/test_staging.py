"""Old or new at every instant: a writer is killed and interrupted at every line of the code that publishes."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from cpmbee import file_system, staging
from cpmbee.errors import ExportError
from cpmbee.staging import recover, staged_file, staged_folder

TRACED = {staging.__file__, file_system.__file__, contextlib.__file__}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no disk: thousands of folders are written, and no power fails."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def allow(_: Path) -> None:
    """Everything may be replaced."""


def write(target: Path, content: str) -> None:
    with staged_folder(target, ExportError, allow) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(content)


def read(target: Path) -> str:
    """What is in the folder, seen as readers see it; every file of it is there and of one kind."""
    recover(target)
    assert sorted(entry.name for entry in target.iterdir()) == ["a", "b"]
    (content,) = {entry.read_text() for entry in target.iterdir()}
    return content


def entries(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """How a folder takes the place of another one, by what the system can do."""
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    can = file_system.exchange(tmp_path / "x", tmp_path / "y")
    (tmp_path / "x").rmdir()
    (tmp_path / "y").rmdir()
    if request.param == "two renames":
        monkeypatch.setattr(staging, "exchange", lambda one, other: False)
    elif not can:
        pytest.skip("this file system cannot exchange two names")
    return str(request.param)


def at_line(number: int, call: Callable[[], object], action: Callable[[], object]) -> bool:
    """Do something before a line of the code that is traced, the lines counted as they run; False if it ends before."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in TRACED or frame.f_code.co_name == "__del__":
            return None  # what is raised in the latter is swallowed by Python
        if event == "line":
            count += 1
            if count == number and not (frame.f_back and frame.f_back.f_code.co_name == "__del__"):
                sys.settrace(None)
                action()
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return count >= number


def in_child(call: Callable[[], object]) -> int:
    """Call in a forked process; its exit code, 0 where the call comes back."""
    pid = os.fork()
    if pid == 0:
        try:
            call()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("old", ["old", None])
def test_a_writer_killed_before_any_line_leaves_old_or_new(tmp_path: Path, way: str, old: str | None) -> None:
    target = tmp_path / "model"
    found = []
    number = 0
    killed = 7
    while killed == 7:
        number += 1
        shutil.rmtree(target, ignore_errors=True)
        if old is not None:
            write(target, old)

        def attempt() -> None:
            at_line(number, lambda: write(target, "new"), lambda: os._exit(7))  # noqa: B023

        killed = in_child(attempt)
        recover(target)
        found.append(read(target) if target.exists() else None)
        write(target, "next")  # whatever was left is removed
        assert read(target) == "next"
        assert entries(tmp_path) == ["model"]
    assert killed == 0
    assert number > 50
    assert found == sorted(found, key=lambda each: each == "new")  # new, once it has been
    assert set(found) == {old, "new"}


def test_an_interrupt_before_any_line_leaves_old_or_new(tmp_path: Path, way: str) -> None:
    target = tmp_path / "model"
    number = 1
    seen = set()
    while True:
        write(target, "old")
        published = []

        def interrupt() -> None:
            published.append(target.exists() and (target / "a").read_text() == "new")  # noqa: B023
            raise KeyboardInterrupt

        with contextlib.suppress(KeyboardInterrupt):
            if not at_line(number, lambda: write(target, "new"), interrupt):
                break
        content = read(target)
        assert content == "new" or not published[0]
        seen.add(content)
        write(target, "next")
        assert entries(tmp_path) == ["model"]
        number += 1
    assert number > 50
    assert seen == {"old", "new"}


def test_a_reader_in_the_moment_between_two_renames_gets_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the writer, which is alive, goes on as if nothing had happened."""
    target = tmp_path / "model"
    write(target, "old")
    rename, seen = os.rename, []

    def renaming(source: Path, name: Path) -> None:
        rename(source, name)
        if source == target and not seen:
            assert not target.exists()
            seen.append(read(target))

    monkeypatch.setattr(staging, "exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", renaming)
    write(target, "new")
    assert seen == ["old"]
    assert read(target) == "new"
    assert entries(tmp_path) == ["model"]


def test_a_failing_second_rename_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model"
    write(target, "old")
    rename = os.rename

    def failing(source: Path, name: Path) -> None:
        if ".writing-" in source.name:
            raise OSError(28, "No space left on device")
        rename(source, name)

    monkeypatch.setattr(staging, "exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(ExportError, match="No space left"):
        write(target, "new")
    assert target.exists()  # before any reader has recovered it
    assert read(target) == "old"
    assert entries(tmp_path) == ["model"]


def test_names_like_those_of_leftovers_are_left_alone(tmp_path: Path) -> None:
    kept = [".model.writing-notes", ".model.writing-0a1b2c3", ".other.writing-0a1b2c3d", ".model.replaced"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".model.writing-0a1b2c3d").symlink_to(tmp_path / kept[0])
    write(tmp_path / "model", "new")
    assert entries(tmp_path) == sorted([*kept, ".model.writing-0a1b2c3d", "model"])


def test_a_link_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "real") == "new"
    (tmp_path / "real").rename(tmp_path / ".real.replaced-0a1b2c3d")
    assert read(tmp_path / "link") == "new"
    assert entries(tmp_path) == ["link", "real"]


def test_an_error_names_the_file_and_leaves_others_errors_alone(tmp_path: Path) -> None:
    def failing(filename: Path | None) -> None:
        with staged_folder(tmp_path / "model", ExportError, allow) as folder:
            place = None if filename is None else str(folder / filename)
            raise OSError(28, "No space left on device", place)

    with pytest.raises(ExportError, match=r"model/weights: cannot be written \(No space left on device\)"):
        failing(Path("weights"))
    with pytest.raises(ExportError, match=r"model: cannot be written \(No space left on device\)"):
        failing(None)
    with pytest.raises(OSError, match="elsewhere"):
        failing(tmp_path / "elsewhere")
    assert entries(tmp_path) == []


def write_file(target: Path, content: str) -> None:
    with staged_file(target) as file:
        file.write(content[:1])
        file.write(content[1:])


def test_a_file_is_old_or_new_before_any_line(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    found = []
    number, killed = 0, 7
    while killed == 7:
        number += 1
        write_file(target, "old")

        def attempt() -> None:
            at_line(number, lambda: write_file(target, "new"), lambda: os._exit(7))  # noqa: B023

        killed = in_child(attempt)
        found.append(target.read_text())
        write_file(target, "next")
        assert entries(tmp_path) == ["out.jsonl"]
    assert killed == 0
    assert set(found) == {"old", "new"}


def test_a_file_keeps_its_mode_and_links_to_it(tmp_path: Path) -> None:
    target = tmp_path / "private.jsonl"
    write_file(target, "old")
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()
    target.chmod(0o600)
    (tmp_path / "link").symlink_to(target)
    write_file(tmp_path / "link", "new")
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "link").is_symlink()


def test_what_is_no_ordinary_file_is_not_replaced(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    write_file(Path(f"/dev/fd/{writing}"), "text")
    assert os.read(reading, 10) == b"text"
    os.close(reading)
    os.close(writing)
    write_file(Path(os.devnull), "text")
    assert not Path(os.devnull).is_file()
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path, "text")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        write_file(tmp_path / "none" / "file", "text")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
