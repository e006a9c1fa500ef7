"""``cpmbee export`` and ``cpmbee verify``: exit codes, one-line errors, a summary."""

import json
from pathlib import Path

import pytest

from cpmbee.cli import main
from tests.export.cases import make_checkpoint
from tests.model.factory import random_model, write_checkpoint


def test_export_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, out = make_checkpoint(tmp_path / "checkpoint"), tmp_path / "out"
    assert main(["export", str(checkpoint), str(out), "--precision", "fp16"]) == 0
    printed = capsys.readouterr()
    assert "exported" in printed.out
    assert "checks passed" in printed.out
    assert printed.err == ""  # no bar where nobody looks
    assert json.loads((out / "engine.json").read_text())["precision"]["ffn"] == "fp16"
    assert main(["verify", str(out), str(checkpoint)]) == 0
    assert "beam answers" in capsys.readouterr().out


def test_verify_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, out = make_checkpoint(tmp_path / "checkpoint"), tmp_path / "out"
    assert main(["export", str(checkpoint), str(out), "--no-verify"]) == 0
    assert "not verified" in capsys.readouterr().out
    other = write_checkpoint(tmp_path / "other", random_model(seed=1))
    assert main(["verify", str(out), str(other)]) == 1
    assert "FAILED source" in capsys.readouterr().out


def test_existing_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(make_checkpoint(tmp_path / "checkpoint")), str(tmp_path / "out"), "--no-verify"]
    assert main(arguments) == 0
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--overwrite" in error
    assert main([*arguments, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["export"], 2),
        (["export", "a", "b", "--precision", "int3"], 2),
        (["export", "no-such-checkpoint", "b"], 1),
        (["export", "a", "b", "--lora-alpha", "16"], 1),
        (["verify", "no-such-folder", "a"], 1),
        (["verify", "--help"], 0),
    ],
)
def test_exit_codes(
    arguments: list[str], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    if code == 1:
        assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [["export", "base", "out"], ["verify", "out", "base"], ["finetune", "base", "x", "out"], ["eval", "x", "y"]],
)
def test_two_deltas_are_refused_before_anything_is_read(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--lora", "one", "--lora", "two"]) == 2
    assert "--lora is given twice; merge one of them first" in capsys.readouterr().err
