"""Lines of files and pipes: numbered, as soon as they are there, and never longer than the limit."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpmbee.errors import DataError
from cpmbee.jsonl import all_lines, numbered_lines

LINES = st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b" ")), max_size=8)


@given(lines=LINES, ended=st.booleans(), marked=st.booleans())
def test_every_line_is_there_once_or_known_to_be_too_long(lines: list[bytes], ended: bool, marked: bool) -> None:
    content = b"\n".join(lines) + b"\n" * ended
    expected = content.split(b"\n")[: None if content.rpartition(b"\n")[2] else -1] if content else []
    file = io.BytesIO(b"\xef\xbb\xbf" * marked + content)
    found = list(all_lines(file, "here", DataError, 8))
    assert [number for number, _, _ in found] == list(range(1, len(expected) + 1)) or (marked and not content)
    for (number, line, _), text in zip(found, expected, strict=False):
        extra = 3 if marked and number == 1 else 0
        if line is None:
            assert len(text) + extra >= 8
        else:
            assert line.removesuffix(b"\n") == (text if extra else text.removeprefix(b"\xef\xbb\xbf"))


def test_blank_lines_count_but_are_left_out() -> None:
    file = io.BytesIO("\ufeff\n a \n\r\n\u2028b\x85\n".encode())
    assert list(numbered_lines(file, "here", DataError)) == [(2, b" a \n"), (4, "\u2028b\x85\n".encode())]


def test_a_line_without_end_is_an_error_at_once() -> None:
    with open("/dev/zero", "rb") as file, pytest.raises(DataError, match="zeros, line 1: longer than 1,048,576 bytes"):
        next(numbered_lines(file, "zeros", DataError, 1 << 20))


def test_a_long_line_is_named_and_skipped_on_request(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"a\n" + b"b" * 5_000_000 + b"\nc\n")
    with file.open("rb") as opened:
        lines = list(all_lines(opened, "here", DataError, 100))
        assert [line for _, line, _ in lines] == [b"a\n", None, b"c\n"]
        assert sum(size for _, _, size in lines) == file.stat().st_size
        opened.seek(0)
        with pytest.raises(DataError, match="here, line 2: longer than 100 bytes; a record is one line"):
            list(numbered_lines(opened, "here", DataError, 100))


def test_lines_of_a_pipe_come_as_they_are_written() -> None:
    read, write = os.pipe()
    with open(read, "rb") as file, open(write, "wb", buffering=0) as pipe:
        lines = numbered_lines(file, "pipe", DataError)
        for number in (1, 2, 3):
            pipe.write(b"x\n")
            assert next(lines) == (number, b"x\n")


def test_a_disk_that_fails_is_an_error_of_ours() -> None:
    class Failing(io.BytesIO):
        def readline(self, _: int | None = -1, /) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(DataError, match=r"here, line 1: cannot be read \(Input/output error\)"):
        list(numbered_lines(Failing(), "here", DataError))
