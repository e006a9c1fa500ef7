"""The checkpoint that the package carries, through export and engine, as its users run it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cpmbee
import cpmbee.model
from cpmbee.export import demo
from cpmbee.export.exporter import export
from cpmbee.train import numerals

MAX_NEW_TOKENS = 24
STATED = {"转繁体": 0.9, "写成数字": 0.9, "写成汉字": 0.9, "question": 0.8, "options": 0.8}  # least accuracy, by form


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> cpmbee.Engine:
    folder = tmp_path_factory.mktemp("demo") / "model"
    export(demo.demo_checkpoint(), folder, verify=False)
    return cpmbee.Engine.from_pretrained(folder)


def bundled_requests() -> list[dict[str, Any]]:
    text = (demo.demo_checkpoint() / "requests.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def form(request: dict[str, Any]) -> str:
    return "options" if "options" in request else request.get("prompt", "question")


def test_it_answers_the_held_out_requests_that_come_with_it(engine: cpmbee.Engine) -> None:
    solved = bundled_requests()
    results = engine.generate(
        [{**request, "<ans>": ""} for request in solved], max_new_tokens=MAX_NEW_TOKENS, beam_size=1
    )
    right: dict[str, list[bool]] = {}
    for request, result in zip(solved, results, strict=True):
        right.setdefault(form(request), []).append(result.answer == request["<ans>"])
    assert {name: len(found) for name, found in right.items()} == dict.fromkeys(STATED, 100)
    assert all(np.mean(found) >= STATED[name] for name, found in right.items()), {
        name: np.mean(found) for name, found in right.items()
    }


def test_at_least_nine_of_ten_held_out_numbers_are_right(engine: cpmbee.Engine) -> None:
    examples = numerals.held_out_examples(np.random.default_rng(7), 100)
    requests = [example.request for example in examples]
    results = engine.generate(requests, max_new_tokens=MAX_NEW_TOKENS, beam_size=1)
    right = dict.fromkeys(numerals.DIRECTIONS, 0)
    for example, result in zip(examples, results, strict=True):
        right[example.direction] += result.answer == example.answer
    assert all(count >= 90 for count in right.values()), right


def test_numerals_among_its_requests_are_held_out() -> None:
    for request in bundled_requests():
        if form(request) in numerals.PROMPTS.values():
            digits, numeral = request["input"], request["<ans>"]
            if request["prompt"] == numerals.PROMPTS["digits"]:
                digits, numeral = numeral, digits
            assert numerals.from_chinese(numeral) == int(digits)
            assert numerals.is_held_out(int(digits))


def test_the_command_shows_answers_and_speed_and_replaces_its_own_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo-model"
    for more in ([], ["--overwrite"]):
        assert demo.main(["--out", str(out), *more]) == 0
        printed = capsys.readouterr().out
        for answer in ("白髮三千丈", "háng", "<option_1>", "3005", "三千零五"):
            assert f"->  {answer}\n" in printed
        assert "tokens/s" in printed
        assert (out / "model.onnx").is_file()


def test_the_command_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not lose this")
    with pytest.raises(cpmbee.CpmBeeError):
        demo.main(["--out", str(tmp_path)])
    assert (tmp_path / "thesis.tex").read_text() == "do not lose this"
