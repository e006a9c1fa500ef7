"""What the command line takes for requests: lines, documents, pipes that are answered as they come, endless lines."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cpmbee import cli, jsonl
from cpmbee.errors import PromptError
from cpmbee.request_file import Entry, RequestFile

COMMAND = [sys.executable, "-c", "import sys; from cpmbee.cli import main; sys.exit(main())", "generate"]
FIRST, SECOND = {"input": "今天", "<ans>": ""}, {"input": '[{北京, \\"', "<ans>": {"a": ""}}


def lines(*requests: Any) -> str:
    return "".join(json.dumps(request, ensure_ascii=False) + "\n" for request in requests)


def read(path: Path, text: str | bytes) -> list[Entry]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(RequestFile(str(path)))


def read_pipe(text: str) -> list[Entry]:
    """The same from a pipe, where reading on may wait."""
    read_end, write_end = os.pipe()
    threading.Thread(target=lambda: (os.write(write_end, text.encode()), os.close(write_end))).start()
    try:
        return list(RequestFile(f"/dev/fd/{read_end}"))
    finally:
        os.close(read_end)


@pytest.mark.parametrize("indent", [None, 0, 2, "\t"])
def test_one_document_is_one_request_or_many(tmp_path: Path, indent: int | str | None) -> None:
    def written(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    for text, expected in [
        (written(SECOND), [SECOND]),
        ("\ufeff\n" + written(SECOND) + "\n\n", [SECOND]),
        (written(SECOND).replace("\n", "\n\r\n"), [SECOND]),
        (written([FIRST, SECOND, FIRST]), [FIRST, SECOND, FIRST]),
        (f"[\n{written(FIRST)}\n,{written(SECOND)}\n]", [FIRST, SECOND]),
        (f"[{written(FIRST)},\n{written(SECOND)}]\n", [FIRST, SECOND]),
        ("[]", []),
        ("", []),
        ("\n \n", []),
    ]:
        for entries in (read(tmp_path / "in.json", text), read_pipe(text)):
            assert [entry.data for entry in entries] == expected, text


def test_a_file_may_break_its_lines_anywhere(tmp_path: Path) -> None:
    assert [entry.data for entry in read(tmp_path / "in", '{"input": "a"\n,"<ans>"\n: ""\n}')] == [
        {"input": "a", "<ans>": ""}
    ]


@pytest.mark.parametrize("from_pipe", [False, True])
@pytest.mark.parametrize(
    "broken",
    ['{"input": "a"', '{"input": "a", "<ans>": {', '{"input": "a",', "[", '{"input": "a', "nonsense", "]", "{}{"],
)
def test_anything_else_is_one_line_one_request(tmp_path: Path, broken: str, from_pipe: bool) -> None:
    text = f"{broken}\n{lines(FIRST, SECOND)}{broken}\n{lines(FIRST)}"
    entries = read_pipe(text) if from_pipe else read(tmp_path / "in", text)
    assert [entry.data for entry in entries] == [None, FIRST, SECOND, None, FIRST]
    assert [entry.line for entry in entries] == [1, 2, 3, 4, 5]
    assert all("not JSON" in entry.error for entry in entries if entry.data is None)


def test_a_broken_document_is_one_error_that_names_the_place(tmp_path: Path) -> None:
    whole = json.dumps([FIRST] * 9, indent=1)
    for text, place in [
        (whole[:-1], "line 38"),
        (whole.replace('""\n }\n]', '"",\n }\n]'), "line 37"),
        ("\n\n" + whole[:-1] + ",", "line 40"),
    ]:
        (entry,) = read(tmp_path / "in", text)
        assert entry.data is None
        assert "not JSON" in entry.error
        assert place in entry.error
        assert entry.line == (3 if text.startswith("\n") else 1)


def test_items_of_an_array_fail_alone(tmp_path: Path) -> None:
    entries = read(tmp_path / "in", json.dumps([FIRST, 7, {**SECOND, "id": 3}], indent=1))
    assert [entry.data for entry in entries] == [FIRST, None, SECOND]
    assert entries[1].located(entries[1].error) == f"{tmp_path / 'in'}, line 1, item 2: expected a JSON object"
    assert entries[2].id == 3


def test_a_line_or_document_without_an_end_ends_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl.numbered_lines, "__defaults__", (1 << 10,))
    monkeypatch.setattr("cpmbee.json_document.MAX_LINE", 1 << 20)
    first, last = read(tmp_path / "in", lines(FIRST) + " " * (2 << 10) + lines(FIRST))
    assert first.data == FIRST
    assert last.data is None
    assert last.located(last.error).startswith(f"{tmp_path / 'in'}, line 2: longer than")
    (entry,) = read(tmp_path / "in", "[\n" + '{"input": "a", "<ans>": ""},\n' * (1 << 16))
    assert entry.error.startswith(f"{tmp_path / 'in'}, line 1: begins a JSON value of more than 1 MiB")


def test_an_endless_line_of_a_device(small_folder: Path) -> None:
    with open("/dev/zero", "rb") as zeros:
        done = subprocess.run([*COMMAND, str(small_folder)], stdin=zeros, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(b"cpmbee: standard input, line 1: longer than 67,108,864 bytes; ")
    assert done.stderr.count(b"\n") == 1


def test_what_was_read_before_a_line_without_an_end_is_written(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jsonl.numbered_lines, "__defaults__", (1 << 10,))
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(lines(FIRST, FIRST) + "x" * 9999, encoding="utf-8")
    assert cli.main(["generate", str(small_folder), str(source), "--output", str(target), "--max-new-tokens", "2"]) == 1
    *answered, last = map(json.loads, target.read_text(encoding="utf-8").splitlines())
    assert all("answer" in record for record in answered)
    assert len(answered) == 2
    assert last["error"].startswith(f"{source}, line 3: longer than")


@pytest.fixture
def coprocess(small_folder: Path) -> Iterator[subprocess.Popen[str]]:
    arguments = [*COMMAND, str(small_folder), "--max-new-tokens", "2", "--threads", "1"]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    ) as process:
        # A failure shows as an answer that does not come: end it, so that the test does, too.
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        yield process
        watchdog.cancel()
        process.kill()


def test_a_pipe_is_answered_line_by_line(coprocess: subprocess.Popen[str]) -> None:
    assert coprocess.stdin is not None
    assert coprocess.stdout is not None
    assert coprocess.stderr is not None

    def ask(text: str) -> dict[str, Any]:
        assert coprocess.stdin is not None
        assert coprocess.stdout is not None
        coprocess.stdin.write(text)
        coprocess.stdin.flush()
        answer: dict[str, Any] = json.loads(coprocess.stdout.readline())
        return answer

    assert "line 1:" not in ask('{"input": "a"\n')["error"]  # not taken for the beginning of something longer
    assert "answer" in ask(lines(FIRST))
    assert "answer" in ask(lines(FIRST) + "\n\n")  # blank lines are nothing to wait at
    assert ask("nonsense\n")["line"] == 6
    assert "answer" in ask(lines(FIRST) + '{"input": "half a')
    assert "answer" in ask(' line", "<ans>": ""}\n')
    coprocess.stdin.write(lines(*[{**FIRST, "id": i} for i in range(50)]))
    coprocess.stdin.close()
    assert [json.loads(line)["id"] for line in coprocess.stdout] == list(range(50))
    assert coprocess.wait(30) == 1
    assert coprocess.stderr.read().endswith("; 2 of 56 requests failed\n")


def test_a_document_on_a_pipe_is_answered_when_it_is_complete(coprocess: subprocess.Popen[str]) -> None:
    assert coprocess.stdin is not None
    assert coprocess.stdout is not None
    coprocess.stdin.write(json.dumps(FIRST, indent=2) + "\n")
    coprocess.stdin.flush()
    assert "answer" in json.loads(coprocess.stdout.readline())


def test_an_interrupt_while_a_pipe_is_silent(coprocess: subprocess.Popen[str]) -> None:
    assert coprocess.stdin is not None
    assert coprocess.stdout is not None
    coprocess.stdin.write(lines(FIRST))
    coprocess.stdin.flush()
    assert "answer" in json.loads(coprocess.stdout.readline())
    coprocess.send_signal(2)
    assert coprocess.wait(30) == 130
    assert coprocess.stderr is not None
    assert coprocess.stderr.read() == ""


def test_a_failure_of_the_reading_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("none left")

    read_end, write_end = os.pipe()
    os.write(write_end, lines(FIRST).encode())
    os.close(write_end)
    monkeypatch.setattr(RequestFile, "_entries", fail)
    with pytest.raises(MemoryError, match="none left"):
        list(RequestFile(f"/dev/fd/{read_end}").batches(4))
    os.close(read_end)


def test_standard_input_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines(FIRST, SECOND).encode())))
    requests = RequestFile("-")
    requests.count()
    assert requests.total == 2
    assert [len(batch) for batch in requests.batches(5)] == [2]
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(PromptError, match="standard input is closed"):
        RequestFile("-")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (lines(FIRST, SECOND, FIRST), ["67% 2 of 3", "100% 3 of 3"]),
        (lines(FIRST) + "\n\nnonsense\n" + lines(FIRST), ["67% 2 of 3", "100% 3 of 3"]),
        (json.dumps([FIRST] * 3, indent=2), ["67% 2 of 3", "100% 3 of 3"]),
        (json.dumps([FIRST] * 3), ["67% 2 of 3", "100% 3 of 3"]),
        (json.dumps(FIRST, indent=2), ["100% 1 of 1"]),
    ],
)
def test_progress_is_real(
    small_folder: Path, tmp_path: Path, text: str, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, terminal = tmp_path / "in", Terminal()
    source.write_text(text, encoding="utf-8")
    monkeypatch.setattr("cpmbee.progress._REDRAW_SECONDS", 0)
    monkeypatch.setattr("sys.stderr", terminal)
    cli.main(["generate", str(small_folder), str(source), "--batch-size", "2", "--max-new-tokens", "2"])
    assert re.findall(r"\] +(\d+% \d+ of \d+), [\d.,]+/s requests", terminal.getvalue()) == shown


def test_progress_of_a_pipe_counts(small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=lambda: pipe.write_text(lines(FIRST, SECOND), encoding="utf-8")).start()
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert cli.main(["generate", str(small_folder), str(pipe), "--max-new-tokens", "2"]) == 0
    assert "\r\x1b[K" in terminal.getvalue()
    assert "%" not in terminal.getvalue()
