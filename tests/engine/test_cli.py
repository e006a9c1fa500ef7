"""The command line: what is printed where, exit codes, and files that appear only when complete."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import cpmbee
from cpmbee import cli, cli_generate
from cpmbee.progress import ProgressBar

REQUEST = '{"input": "今天天气真好", "<ans>": {"a": "", "b": ""}}'


@pytest.fixture
def engine(small_folder: Path) -> cpmbee.Engine:
    return cpmbee.Engine.from_pretrained(small_folder, num_threads=1)


def generate(folder: Path, *arguments: str) -> int:
    return cli.main(["generate", str(folder), *arguments])


def test_one_request(small_folder: Path, engine: cpmbee.Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(small_folder, "--beam-size", "3", REQUEST, "--max-new-tokens=9", "--threads", "1") == 0
    printed = json.loads(capsys.readouterr().out)
    expected = engine.generate(json.loads(REQUEST), beam_size=3, max_new_tokens=9)
    assert printed["answer"] == expected.answer
    assert printed["finish_reason"] == expected.finish_reason
    assert printed["score"] == pytest.approx(expected.score)
    assert set(printed) == {"answer", "score", "finish_reason", "usage", "timings"}


def test_json_lines_keep_their_order(small_folder: Path, engine: cpmbee.Engine, tmp_path: Path) -> None:
    requests = [{"input": "ab" * i, "<ans>": ""} for i in range(7)]
    source, target, examples = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "examples.jsonl"
    source.write_text("\n\n".join(json.dumps(request) for request in requests), encoding="utf-8")
    examples.write_text('{"input": "今天", "<ans>": "好"}\n', encoding="utf-8")
    arguments = ["--batch-size", "3", "--examples", str(examples), "--max-new-tokens", "5", "--threads", "1"]
    assert generate(small_folder, str(source), "--output", str(target), *arguments) == 0
    answers = [json.loads(line)["answer"] for line in target.read_text(encoding="utf-8").splitlines()]
    expected = engine.generate(requests, [{"input": "今天", "<ans>": "好"}], max_new_tokens=5)
    assert answers == [result.answer for result in expected]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["examples.jsonl", "in.jsonl", "out.jsonl"]


def test_standard_input_and_stream(
    small_folder: Path,
    engine: cpmbee.Engine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = f'{{"input": "北京", "<ans>": ""}}\n{REQUEST}\n'.encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert generate(small_folder, "--stream", "--max-new-tokens", "30") == 0
    first = engine.generate({"input": "北京", "<ans>": ""}, max_new_tokens=30).answer
    second = engine.generate(json.loads(REQUEST), max_new_tokens=30).answer
    labelled = "\n".join(f"{key}: {text}" for key, text in second.items() if text)
    assert capsys.readouterr().out == f"{first}\n{labelled}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2: not JSON"),
        pytest.param("[" * 200_000, "line 2: not JSON", id="nested too deep"),
        ("[1]", "line 2: expected a JSON object"),
        ('{"input": "a"}', "line 2: "),
        ('{"input": "a < b", "<ans>": ""}', r"line 2: $.input"),
        ('{"input": "' + "a" * 9000 + '", "<ans>": ""}', "cache rows"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(
    small_folder: Path, tmp_path: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"input": "a", "<ans>": ""}\n' + line + "\n", encoding="utf-8")
    assert generate(small_folder, str(source), "--output", str(target), "--batch-size", "1") == 1
    error = capsys.readouterr().err
    assert message in error
    assert "in.jsonl, line " in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["{}", "--max-new-tokens", "-3"],
        ["{}", "--beam-size", "2", "--top-k", "4"],
        ["{}", "--nonsense"],
        ['{"input": '],
        ["[1, 2]"],
        ["{}", "--stream", "--output", "x"],
        ["{}", "--batch-size", "0"],
        ["{}", "--threads", "-1"],
        ["{}", "--cache-tokens", "many"],
    ],
)
def test_wrong_use(small_folder: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(small_folder, *arguments) == 2
    assert "error: " in capsys.readouterr().err


def test_failures_are_one_line(
    small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (
        [str(tmp_path / "absent"), "{}"],
        [str(small_folder), str(tmp_path / "absent.jsonl")],
        [str(small_folder), "{}", "--output", str(tmp_path / "absent" / "out")],
    ):
        assert cli.main(["generate", *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith("cpmbee: ")
        assert "absent" in error
        assert error.count("\n") == 1
    assert cli.main(["generate", str(tmp_path / "absent"), "{}", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err

    def broken(argv: list[str]) -> int:
        raise RuntimeError("out\nof luck")

    monkeypatch.setattr(cli_generate, "main", broken)
    assert generate(small_folder) == 1
    assert capsys.readouterr().err == "cpmbee: RuntimeError: out of luck (--debug shows where)\n"


def test_interrupted(
    small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_generate, "_generate", interrupt)
    assert generate(small_folder, REQUEST, "--output", str(tmp_path / "out.jsonl")) == 130
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [ImportError, AttributeError, cpmbee.DependencyError, SystemError])
def test_an_interrupt_that_an_import_turned_into_another_error(
    kind: type[Exception], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def importing(argv: list[str]) -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise kind("cannot import name 'x' from partially initialized module") from None
        return 0

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(cli_generate, "main", importing)
    assert cli.main(["generate"]) == 130
    assert capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(cli_generate, "main", lambda _: 0)
    assert cli.main(["generate"]) == 0


def test_an_interrupt_within_an_import_of_a_real_process(tmp_path: Path) -> None:
    package = tmp_path / "numpy"
    package.mkdir()
    code = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000): pass
except KeyboardInterrupt: pass
raise ImportError("numpy failed to import: reinstall it")
"""
    (package / "__init__.py").write_text(code, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "cpmbee", "generate", "model", "{}"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stderr) == (130, "")


def test_any_failure_is_one_short_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        RuntimeError("\x1b[2J" + "x" * 5000),
        OSError(2, "No such file", "a\nb\x1b[2J" + "x" * 5000),
        ModuleNotFoundError("no", name="x\n" * 999),
        MemoryError(),
        cpmbee.DataError("a\nb" + "x" * 5000),
    ):

        def fail(_: list[str], error: Exception = error) -> int:
            raise error

        monkeypatch.setattr(cli_generate, "main", fail)
        assert cli.main(["generate"]) == 1
        said = capsys.readouterr().err
        assert said.startswith("cpmbee: ")
        assert said.removesuffix("\n").isprintable()
        assert len(said) <= 520


def test_python_m() -> None:
    command = [sys.executable, "-m", "cpmbee", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout) == (0, f"cpmbee {cpmbee.__version__}\n")


def test_killed_politely(small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli_generate, "_generate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert generate(small_folder, REQUEST, "--output", str(tmp_path / "out.jsonl")) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_top_level(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"cpmbee {cpmbee.__version__}\n"
    assert cli.main(["--help"]) == 0
    assert all(command in capsys.readouterr().out for command in ("generate",))
    assert cli.main([]) == 2
    assert cli.main(["nonsense"]) == 2
    assert "no command 'nonsense'" in capsys.readouterr().err


def test_progress_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    with ProgressBar(terminal) as bar:
        bar("writing", 0.5)
        bar("writing", 0.51)  # too soon to draw again
        bar("checking", 1.0)
    assert " 50% writing" in terminal.getvalue()
    assert "51%" not in terminal.getvalue()
    assert "100% checking" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")
    quiet = io.StringIO()
    with ProgressBar(quiet) as bar:
        bar("writing", 0.5)
    assert quiet.getvalue() == ""
