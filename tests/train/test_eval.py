"""Evaluation: the same numbers through PyTorch and the engine, checked against counting by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cpmbee.cli import main
from cpmbee.engine import Engine
from cpmbee.errors import DataError
from cpmbee.export import export
from cpmbee.model import load_model
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.evaluation import evaluate
from cpmbee.train.jsonl import JsonLines, open_records
from cpmbee.train.task_metrics import TaskMetrics
from cpmbee.train.tasks import TaskFields, TaskRecord, read_tasks
from cpmbee.train.torch_backend import TorchBackend
from tests.model.factory import write_checkpoint
from tests.train.task_files import choice_records, copy_records, write_records

MIXED = [
    *({**record, "task": "choose"} for record in choice_records(20)),
    *({**record, "task": "copy"} for record in copy_records(10)),
    {"input": "ab☂", "<ans>": {"x": "☂", "y": "a"}, "task": "two"},
    {"input": "ab", "<ans>": "☂", "task": "two"},  # not to be written: the request has no such token
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("eval") / "base")


@pytest.fixture(scope="module")
def folder(checkpoint: Path) -> Path:
    export(checkpoint, checkpoint.parent / "exported", verify=False)
    return checkpoint.parent / "exported"


def torch_engine(checkpoint: Path) -> Engine:
    return Engine(TorchBackend(load_model(checkpoint), 1024), Tokenizer.from_file(checkpoint / "vocab.txt"))


def mixed(tmp_path: Path) -> list[TaskRecord]:
    return list(read_tasks(open_records(write_records(tmp_path / "mixed.jsonl", MIXED)), TaskFields(task="task")))


def test_same_numbers_through_both(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    records = mixed(tmp_path)
    ours = evaluate(torch_engine(checkpoint), records)
    theirs = evaluate(Engine.from_pretrained(folder, num_threads=1), records)
    for one, other in zip(ours.predictions, theirs.predictions, strict=True):
        assert (one.answer, one.exact, one.choice, one.right) == (other.answer, other.exact, other.choice, other.right)
    for part, expected in zip(
        (ours.overall, *ours.tasks.values()), (theirs.overall, *theirs.tasks.values()), strict=True
    ):
        assert part.to_dict() == pytest.approx(expected.to_dict(), rel=1e-4)
    assert set(ours.tasks) == {"choose", "copy", "two"}
    assert TaskMetrics(records, Tokenizer.from_file(checkpoint / "vocab.txt"))(load_model(checkpoint)) == {
        name: pytest.approx(value, abs=1e-4)
        for name, value in [
            *ours.overall.metrics().items(),
            *((f"{name}/{task}", v) for task, part in ours.tasks.items() for name, v in part.metrics().items()),
        ]
    }


def test_metrics_are_what_their_names_say(checkpoint: Path, tmp_path: Path) -> None:
    engine = torch_engine(checkpoint)
    evaluation = evaluate(engine, mixed(tmp_path))
    predictions = evaluation.predictions
    logprob = tokens = right = exact = 0.0
    for record, prediction in zip(MIXED, predictions, strict=True):
        request = {name: value for name, value in record.items() if name != "task"}
        if record["<ans>"] != "☂":
            (score,) = engine.score(request, [record["<ans>"]])
            assert prediction.logprob == pytest.approx(score.logprob, abs=1e-4)
            logprob, tokens = logprob + score.logprob, tokens + score.tokens
        if "options" in record:
            scores = engine.score(request, list(record["options"]))
            best = max(scores, key=lambda score: score.logprob).choice
            assert (prediction.choice, prediction.right) == (best, best == record["<ans>"])
            right += prediction.right
        result = engine.generate(request, max_new_tokens=12)
        assert prediction.exact == (result.answer == record["<ans>"] and result.finish_reason == "stop")
        exact += prediction.exact
    overall = evaluation.overall
    assert (overall.records, overall.scored, overall.choice_records) == (32, 31, 20)
    assert overall.tokens == tokens
    assert overall.loss == pytest.approx(-logprob / tokens, abs=1e-4)
    assert overall.perplexity == pytest.approx(math.exp(-logprob / tokens), rel=1e-3)
    assert overall.choice_accuracy == right / 20
    assert overall.exact_match == exact / 32
    assert evaluation.tasks["two"].scored == 1
    assert predictions[-1].logprob is None


def test_choices_of_a_field(checkpoint: Path, tmp_path: Path) -> None:
    record = {"input": "今天", "labels": ["真好", "北京"], "<ans>": "北京"}
    (task,) = read_tasks(open_records(write_records(tmp_path / "a.jsonl", [record])), TaskFields(choices="labels"))
    assert task.choices == ("真好", "北京")
    assert task.request == {"input": "今天", "<ans>": "北京"}  # a list is not part of a request
    (prediction,) = evaluate(torch_engine(checkpoint), [task]).predictions
    assert [score.choice for score in prediction.scores] == ["真好", "北京"]
    keyed = {"input": "今天", "answers": {"<option_1>": "真好", "<option_2>": "北京"}, "<ans>": "<option_2>"}
    (task,) = read_tasks(open_records(write_records(tmp_path / "b.jsonl", [keyed])), TaskFields(choices="answers"))
    assert task.choices == ("<option_1>", "<option_2>")
    assert task.request == keyed
    several = {"input": "a", "pairs": [{"x": "a", "y": "b"}, {"x": "b", "y": "a"}], "<ans>": {"x": "b", "y": "a"}}
    (task,) = read_tasks(open_records(write_records(tmp_path / "c.jsonl", [several])), TaskFields(choices="pairs"))
    (prediction,) = evaluate(torch_engine(checkpoint), [task], ["choice_accuracy"]).predictions
    assert prediction.choice in several["pairs"]
    assert (prediction.logprob, prediction.exact) == (None, None)


def test_command(checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_records(tmp_path / "choices.jsonl", choice_records(20))
    reports: list[dict[str, Any]] = []
    for model in (checkpoint, folder):
        predictions, output = tmp_path / "predictions.jsonl", tmp_path / "report.json"
        arguments = ["eval", str(model), str(file), "--predictions", str(predictions), "--output", str(output)]
        assert main(arguments) == 0
        reports.append(json.loads(capsys.readouterr().out))
        assert json.loads(output.read_text(encoding="utf-8")) == reports[-1]
        lines = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
        assert len(lines) == 20
        assert lines[3]["where"] == f"{file}, line 4"
        assert sum(line["right"] for line in lines) / 20 == reports[-1]["choice_accuracy"]
        assert lines[0]["scores"][0].keys() == {"choice", "logprob", "tokens"}
    assert [report["backend"] for report in reports] == ["torch", "engine"]
    assert reports[0]["loss"] == pytest.approx(reports[1]["loss"], abs=1e-4)
    assert reports[0]["choice_accuracy"] == reports[1]["choice_accuracy"]
    assert main(["eval", str(folder), str(file), "--metrics", "loss", "--limit", "5"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["records"] == 5
    assert not {"exact_match", "choice_accuracy"} & set(report)


def test_examples_are_seen_beside_every_record(
    checkpoint: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    solved = [{**record, "kind": "choose"} for record in choice_records(6, seed=2)]
    asked = [{**record, "kind": "choose"} for record in choice_records(5)]
    asked += [solved[3], *({**record, "kind": "copy"} for record in copy_records(3))]
    examples, file = write_records(tmp_path / "solved.jsonl", solved), write_records(tmp_path / "asked.jsonl", asked)
    common = [str(file), "--task", "kind", "--examples", str(examples)]

    def run(model: Path, *options: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        lines = tmp_path / "predictions.jsonl"
        assert main(["eval", str(model), *common, *options, "--predictions", str(lines)]) == 0
        report = json.loads(capsys.readouterr().out)
        return report, [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]

    report, predictions = run(folder, "--shots", "3", "--seed", "4")
    other, theirs = run(checkpoint, "--shots", "3", "--seed", "4")
    assert report["examples"] == other["examples"]
    assert len(set(report["examples"])) == 3
    numbers = [int(place.rpartition(" ")[2]) - 1 for place in report["examples"]]
    assert (3 in numbers) == (report["left_out"] == 1)
    assert report["records"] + report["left_out"] == len(asked)
    assert [(p["answer"], p.get("choice")) for p in predictions] == [(p["answer"], p.get("choice")) for p in theirs]
    assert [p["logprob"] for p in predictions] == pytest.approx([p["logprob"] for p in theirs], abs=1e-4)

    engine = torch_engine(checkpoint)
    seen = [{name: value for name, value in solved[i].items() if name != "kind"} for i in numbers]
    request = {name: value for name, value in asked[0].items() if name != "kind"}
    expected = engine.score(request, list(request["options"]), seen)
    assert [s["logprob"] for s in predictions[0]["scores"]] == pytest.approx([s.logprob for s in expected], abs=1e-4)
    assert engine.generate(request, seen, max_new_tokens=12).answer.startswith(predictions[0]["answer"])
    assert engine.score(request, list(request["options"]))[0].logprob != pytest.approx(expected[0].logprob, abs=1e-3)

    everything, _ = run(folder)  # all of them, in order
    assert everything["examples"] == [f"{examples}, line {i}" for i in range(1, 7)]
    assert everything["left_out"] == 1
    for options, code, message in [
        (["--shots", "7"], 1, "7 examples are wanted, and there are 6 records"),
        (["--examples", str(file), "--limit", "5"], 1, "all other records are among the examples"),
        (
            ["--examples", str(write_records(tmp_path / "bad.jsonl", [{"a": "<", "kind": "x", "<ans>": ""}]))],
            1,
            "line 1: $.a",
        ),
    ]:
        assert main(["eval", str(folder), *common, *options]) == code
        assert message in capsys.readouterr().err
    assert main(["eval", str(folder), str(file), "--shots", "2"]) == 2
    assert main(["eval", str(folder), str(file), "--lora-alpha", "2"]) == 2
    assert "--shots needs --examples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected a JSON object, not list"),
        ('{"input": "a"}', 'line 2: $: has no "<ans>" key'),
        (
            '{"input": "a", "options": {"<option_0>": "b"}, "<ans>": "c"}',
            "line 2: $.<ans>: 'c' is not among its 1 choices",
        ),
        ('{"input": 1, "<ans>": "c"}', "line 2: $.input: expected a string or a dict, not int"),
        ('{"input": "a < b", "<ans>": "c"}', "line 2: $.input: the `<` at character 2"),
        ('{"input": "a", "<ans>": "a < b"}', "line 2: $.<ans>: the `<` at character 2"),
        ('{"input": "a", "<ans>": {}}', "line 2: $.<ans>: holds no answer"),
        ('{"input": "a", "<ans>": ["a"]}', "line 2: $.<ans>: expected a string or a dict, not list"),
    ],
)
def test_bad_records(folder: Path, tmp_path: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"input": "a", "<ans>": "b"}\n' + line + "\n", encoding="utf-8")
    assert main(["eval", str(folder), str(file)]) == 1
    error = capsys.readouterr().err
    assert f"{file}, {message}" in error
    assert error.count("\n") == 1


def test_bad_fields_and_files(
    folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_records(tmp_path / "a.jsonl", [{"input": "a", "kind": "x", "labels": {}, "<ans>": "b"}])
    empty = write_records(tmp_path / "empty.jsonl", [])
    for options, message in [
        ([str(file), "--task", "task"], "line 1: $: has no field 'task'"),
        (
            [str(file), "--choices", "kind"],
            "line 1: $.kind: expected choices, a list or a dict with them as keys, not str",
        ),
        ([str(file), "--choices", "labels"], "line 1: $.labels: has no choices"),
        ([str(empty)], "has no records"),
        ([str(tmp_path / "absent.jsonl")], "absent.jsonl: cannot read the records (No such file or directory)"),
        ([str(file), "--lora", "x"], "leave the options out"),
        ([str(file), "--output", str(tmp_path / "absent" / "report.json")], "absent: no such folder"),
    ]:
        assert main(["eval", str(folder), *options]) == 1
        assert message in capsys.readouterr().err
    assert main(["eval", str(checkpoint), str(file), "--device", "cuda:99"]) == 1
    assert "device 'cuda:99' cannot be used here: " in capsys.readouterr().err
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((checkpoint / name).read_bytes())
    assert main(["eval", str(tmp_path / "bare"), str(file)]) == 1
    assert "no vocabulary beside the checkpoint" in capsys.readouterr().err


def test_an_exported_folder_needs_neither_torch_nor_pyarrow(folder: Path, tmp_path: Path) -> None:
    file = write_records(tmp_path / "choices.jsonl", choice_records(3))
    code = (
        "import sys\nfor name in ('torch', 'pyarrow'): sys.modules[name] = None\n"
        "from cpmbee.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    subprocess.run([sys.executable, "-c", code, "eval", str(folder), str(file)], check=True, capture_output=True)


def test_records_of_a_data_set(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_records(tmp_path / "copy.jsonl", copy_records(5))
    assert main(["data", "build", str(file), str(tmp_path / "built")]) == 0
    reports = []
    for source in (file, tmp_path / "built"):
        capsys.readouterr()
        assert main(["eval", str(folder), str(source)]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert reports[0]["loss"] == pytest.approx(reports[1]["loss"])


def test_lines_are_found_again(tmp_path: Path) -> None:
    file = tmp_path / "gaps.jsonl"
    file.write_bytes('{"a": "一"}\n\n  \r\n{"a": "二"}\r\n{"a": "三"}'.encode())
    records = JsonLines(file)
    assert [record["a"] for record in records] == ["一", "二", "三"]
    assert [records.where(i).rpartition(" ")[2] for i in range(3)] == ["1", "4", "5"]
    assert records[-1] == {"a": "三"}
    assert records.lengths().tolist() == [1, 1, 1]
    with pytest.raises(IndexError):
        records.payload(3)
    file.write_bytes(b'{"a": "b"}\n{"a": \xff}\n')
    with pytest.raises(DataError, match=r"line 2: not JSON"):
        JsonLines(file).verify()
