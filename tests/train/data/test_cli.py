"""``cpmbee data``: what it prints, and how it says what is wrong."""

from pathlib import Path

import pytest

from cpmbee.cli import main
from cpmbee.train.data import open_dataset
from tests.train.data.cases import PAYLOADS, write_legacy


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('{"input": "今天", "<ans>": "天气"}\n{"input": "abc", "<ans>": "x"}\n{\n', encoding="utf-8")
    return path


def test_build_then_inspect(lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = lines.with_name("out")
    assert main(["data", "build", str(lines), str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"cpmbee: {lines}, line 3: not JSON")
    assert len(captured.err.splitlines()) == 1
    assert not out.exists()
    assert main(["data", "build", str(lines), str(out), "--skip-bad"]) == 0
    printed = capsys.readouterr().out
    assert "2 records, 8 characters, 1 shards" in printed
    assert "left out 1 bad lines; the first was line 3: not JSON" in printed
    assert main(["data", "inspect", str(out), "--verify", "--samples", "1"]) == 0
    printed = capsys.readouterr().out
    assert "2 records, 8 characters" in printed
    assert "0 %: 4, 5 %: 4" in printed
    assert "4-7            2 ###" in printed
    assert 'record 0: {"input": "今天", "<ans>": "天气"}' in printed
    assert "every file matches its checksum" in printed
    assert main(["data", "build", str(lines), str(out)]) == 1
    assert "already exists" in capsys.readouterr().err


def test_text_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.txt").write_text("aaaa\\nbb\\nc\nd\n")
    command = ["data", "build", str(tmp_path / "in.txt"), str(tmp_path / "out"), "--max-length", "4"]
    assert main([*command, "--min-length", "2"]) == 0
    assert "left out 1 pieces" in capsys.readouterr().out
    assert [record["text"] for record in open_dataset(tmp_path / "out")] == ["aaaa", "bb\nc"]
    assert main([*command, "--overwrite", "--no-clean", "--format", "text"]) == 0
    assert len(open_dataset(tmp_path / "out")) == 3
    assert main([*command, "--overwrite", "--min-length", "9"]) == 1
    assert "max_length 4 is less than min_length 9" in capsys.readouterr().err


def test_inspect_says_what_is_wrong(lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = lines.with_name("out")
    main(["data", "build", str(lines), str(out), "--skip-bad"])
    shard = out / "shard-00000.arrow"
    content = bytearray(shard.read_bytes())
    content[content.index(b"abc")] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    assert main(["data", "inspect", str(out), "--verify"]) == 1
    assert capsys.readouterr().err.startswith(f"cpmbee: {shard}: the shard is damaged")
    assert main(["data", "inspect", str(lines.parent)]) == 1
    assert "is not a data set" in capsys.readouterr().err


def test_data_sets_of_the_original_tools_are_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(write_legacy(tmp_path / "old", [PAYLOADS])), "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "40 records" in printed
    assert "every record can be read" in printed
    assert main(["data", "inspect", str(write_legacy(tmp_path / "none", []))]) == 1
    assert "the data set is empty" in capsys.readouterr().err


def test_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 2
    assert main(["data", "build", "only-one"]) == 2
    assert main(["data", "build", "in.txt", "out", "--min-length", "0"]) == 2
    assert main(["data", "build", "in.txt", "out", "--shard-mb", "-1"]) == 2
    assert main(["data", "--help"]) == 0
    assert "build|inspect" in capsys.readouterr().out
