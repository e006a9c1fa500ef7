"""The command line: what is printed where, exit codes, and files that appear only when complete."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cpmbee
from cpmbee import cli, cli_generate
from cpmbee.many_requests import ManyRequests
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


@pytest.mark.parametrize("batch_size", ["1", "16"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "not JSON (Expecting value: column 1 (char 0))"),
        ("{", "not JSON ("),
        pytest.param("[" * 200_000, "not JSON that can be read (nested deeper than 256)", id="nested too deep"),
        ("[1]", "expected a JSON object"),
        ("\udcff", "not JSON (not UTF-8"),
        ('{"input": "a"}', "<ans>"),
        ('{"input": "a", "id": true, "<ans>": ""}', "$.id"),
        ('{"input": "a", "id": 1e999, "<ans>": ""}', "$.id: must be a text or a finite number"),
        ('{"input": "a < b", "<ans>": ""}', "$.input: "),
        ('{"input": "' + "a" * 9000 + '", "<ans>": ""}', "cache rows"),
    ],
)
def test_a_bad_line_fails_alone(
    small_folder: Path, tmp_path: Path, line: str, message: str, batch_size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = '{"input": "a", "<ans>": ""}\n'
    source.write_text(f"{good}\n{line}\n{good}", encoding="utf-8", errors="surrogateescape")
    options = ["--output", str(target), "--batch-size", batch_size, "--max-new-tokens", "3"]
    assert generate(small_folder, str(source), *options) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"cpmbee: {source}, line 3: ")
    assert message in error
    assert error.endswith("; 1 of 3 requests failed\n")
    assert error.count("\n") == 1
    first, failed, last = map(json.loads, target.read_text(encoding="utf-8").splitlines())
    assert first["answer"] == last["answer"]
    assert failed.keys() == {"error", "line"}
    assert failed["line"] == 3
    assert message in failed["error"]
    assert "request 1" not in failed["error"]  # its place in a batch is nobody's business


def test_a_request_that_makes_a_run_fail_fails_alone(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = cpmbee.Engine.generate

    def run_out_of_memory(self: cpmbee.Engine, data: list[dict[str, str]], *rest: Any, **options: Any) -> Any:
        if any(request["input"] == "c" for request in data):
            raise cpmbee.InferenceError("no memory")
        return answer(self, data, *rest, **options)

    monkeypatch.setattr(cpmbee.Engine, "generate", run_out_of_memory)
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"input": "{text}", "<ans>": ""}}\n' for text in "abcd"), encoding="utf-8")
    assert generate(small_folder, str(source), "--max-new-tokens", "3") == 1
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record.get("line") for record in records] == [None, None, 3, None]
    assert records[2]["error"] == "no memory"


def test_a_seeded_answer_depends_on_no_batch(
    small_folder: Path, engine: cpmbee.Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["今天", "b", "今天", "a < b", "今天", "c", "b", "今天", "今天"]
    requests = [{"id": i, "input": text, "<ans>": ""} for i, text in enumerate(texts)]
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(map(json.dumps, requests)), encoding="utf-8")
    sampling = {"temperature": 50.0, "seed": 3, "max_new_tokens": 8}
    good = [{"input": text, "<ans>": ""} for text in texts if text != "a < b"]
    expected = [result.answer for result in engine.generate(good, **sampling)]
    assert len(set(expected)) > 6  # equal requests of a run differ
    for size in ("1", "2", "3", "4", "16"):
        options = ["--temperature", "50", "--seed", "3", "--max-new-tokens", "8", "--batch-size", size]
        assert generate(small_folder, str(source), *options) == 1
        records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [record["answer"] for record in records if "answer" in record] == expected
        assert "error" in records[3]


def test_streams_go_on_behind_a_bad_line(
    small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    good = '{"input": "a", "<ans>": ""}\n'
    source.write_text(f'{good}nonsense\n{{"input": "a < b", "<ans>": ""}}\n{good}', encoding="utf-8")
    assert generate(small_folder, str(source), "--stream", "--max-new-tokens", "3") == 1
    out, err = capsys.readouterr()
    first, last = out.splitlines()
    assert first == last
    messages = err.splitlines()
    assert messages[0].startswith(f"cpmbee: {source}, line 2: not JSON")
    assert messages[1].startswith(f"cpmbee: {source}, line 3: $.input")
    assert messages[2].endswith("; 2 of 4 requests failed")


def test_a_bad_request_on_the_command_line_gives_no_record(
    small_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (['{"input": "a < b", "<ans>": ""}'], ['{"input": "a < b", "<ans>": ""}', "--stream"]):
        assert generate(small_folder, *arguments) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("cpmbee: $.input: ")


def test_a_bad_example_ends_the_run(small_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = tmp_path / "examples.jsonl"
    for bad, message in (("nonsense", "not JSON"), ('{"input": "a < b", "<ans>": "c"}', "input")):
        examples.write_text(f'{{"id": 1, "input": "a", "<ans>": "b"}}\n{bad}\n', encoding="utf-8")
        assert generate(small_folder, REQUEST, "--examples", str(examples)) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"cpmbee: {examples}, line 2: ")
        assert message in err


def test_ids_come_back_and_the_model_does_not_see_them(
    small_folder: Path, engine: cpmbee.Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = ["今天", "", 7, -1.5, 10**30]
    requests: list[dict[str, Any]] = [{"id": name, "input": "天气", "<ans>": ""} for name in ids]
    requests.append({"id": {"a": "天气"}, "<ans>": ""})  # content
    requests.append({"id": "x", "input": "a < b", "<ans>": ""})
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(map(json.dumps, requests)), encoding="utf-8")
    assert generate(small_folder, str(source), "--max-new-tokens", "4") == 1
    *answered, content, failed = map(json.loads, capsys.readouterr().out.splitlines())
    assert [record["id"] for record in answered] == ids
    expected = engine.generate({"input": "天气", "<ans>": ""}, max_new_tokens=4)
    assert all(record["answer"] == expected.answer for record in answered)
    assert all(record["usage"]["prompt_tokens"] == expected.usage.prompt_tokens for record in answered)
    assert "id" not in content
    assert content["usage"]["prompt_tokens"] == len(engine.encode({"id": {"a": "天气"}, "<ans>": ""}))
    assert list(failed) == ["id", "error", "line"]
    assert failed["id"] == "x"
    assert generate(small_folder, json.dumps(requests[0]), "--max-new-tokens", "4") == 0
    assert json.loads(capsys.readouterr().out)["id"] == "今天"


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

    monkeypatch.setattr(ManyRequests, "records", interrupt)
    source = tmp_path / "in.jsonl"
    source.write_text(REQUEST, encoding="utf-8")
    assert generate(small_folder, str(source), "--output", str(tmp_path / "out.jsonl")) == 130
    assert capsys.readouterr().err == ""
    assert list(tmp_path.iterdir()) == [source]


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
    monkeypatch.setattr(ManyRequests, "records", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    source = tmp_path / "in.jsonl"
    source.write_text(REQUEST, encoding="utf-8")
    assert generate(small_folder, str(source), "--output", str(tmp_path / "out.jsonl")) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == [source]
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
        bar("answering", None, "12")
    assert "] " not in terminal.getvalue().split("\r\x1b[K")[-2]  # no bar where nobody knows how much there is
    assert terminal.getvalue().split("\r\x1b[K")[-2] == "12 answering"
    assert " 50% writing" in terminal.getvalue()
    assert "51%" not in terminal.getvalue()
    assert "100% checking" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K")
    quiet = io.StringIO()
    with ProgressBar(quiet) as bar:
        bar("writing", 0.5)
    assert quiet.getvalue() == ""
