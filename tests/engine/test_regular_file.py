"""Opening what may be anything: pipes, devices, folders, pointers of git-lfs, byte order marks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cpmbee.errors import DataError
from cpmbee.regular_file import open_regular, read_regular, read_text

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 21474836480\n"


def fails(path: str | Path, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        open_regular(path, "a test", DataError)
    assert str(caught.value).isprintable()


def test_regular_files_and_links_to_them(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    (tmp_path / "link").symlink_to(file)
    for path in (file, tmp_path / "link", str(file)):
        with open_regular(path, "a test", DataError) as opened:
            assert opened.read() == b"abc"


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", "/dev/zero", "/dev/null"):
        fails(path, "cannot read a test .it is a pipe or a device, not a file")
    fails(tmp_path, "it is a folder, not a file")
    fails(tmp_path / "absent", "absent: cannot read a test .No such file or directory")


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    fails(tmp_path / name, r"(\\x00b|\\ud800): cannot read a test .no file can have this name")


def test_pointers_of_git_lfs_are_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text(POINTER, encoding="utf-8")
    fails(file, r"model\.safetensors: a git-lfs pointer, not a test; .*`git lfs pull`")
    file.write_text(POINTER + "x" * 1024, encoding="utf-8")  # a text that begins like one
    assert read_regular(file, "a test", DataError, 4096).startswith(b"version")


def test_a_limit_is_kept_and_nothing_leaks(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    assert len(read_regular(file, "a test", DataError, 1 << 20)) == 1 << 20
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DataError, match="file: larger than 0 MiB; is this a test"):
        read_regular(file, "a test", DataError, (1 << 20) - 1)
    fails(tmp_path, "a folder")
    assert len(os.listdir("/proc/self/fd")) == before


def test_text_with_and_without_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "file"
    for content in (b"\xef\xbb\xbfa\r\n\xe5\xa4\xa9", b"a\r\n\xe5\xa4\xa9"):
        file.write_bytes(content)
        assert read_text(file, "a test", DataError, 100) == "a\r\n天"
    file.write_bytes(b"a\nb\n\xff")
    with pytest.raises(DataError, match="file:3: not UTF-8"):
        read_text(file, "a test", DataError, 100)
