"""Building: cleaning, splitting, validation, bad lines, and nothing half-written."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from cpmbee.errors import DataError
from cpmbee.train.data import Dataset, TextOptions, build_dataset
from cpmbee.train.data import build as build_module
from cpmbee.train.data.text import clean_text, split_text

wild = st.text(st.sampled_from("ab。！. \t\n\r\u3000\u00a0\u200b\ufeff\x00\x85\u2028今<"), max_size=40)


def build(tmp_path: Path, content: str | bytes, name: str = "in.txt", **options: Any) -> list[Any]:
    source = tmp_path / name
    source.write_bytes(content if isinstance(content, bytes) else content.encode())
    build_dataset(source, tmp_path / "out", overwrite=True, **options)
    return list(Dataset(tmp_path / "out"))


def test_text_becomes_records(tmp_path: Path) -> None:
    found = build(tmp_path, "\ufeff今天\\n天气\r\n\n  \na <b\n")
    assert found == [{"text": "今天\n天气"}, {"text": "a <<b"}]
    manifest = Dataset(tmp_path / "out").manifest
    assert (manifest.records, manifest.characters, manifest.source["lines"]) == (2, 10, 4)


def test_cleaning() -> None:
    dirty = "\ufeff 今天\u3000\u00a0天气\t好\u200b \r\n\r\n\r\n\r\n a\x00b\x85c "
    assert clean_text(dirty) == "今天 天气 好\n\nab\nc"


@given(wild)
def test_cleaning_twice_changes_nothing(text: str) -> None:
    once = clean_text(text)
    assert clean_text(once) == once
    assert not set(once) & set("\t\r\u3000\u00a0\u200b\ufeff\x00\x85\u2028")
    assert "  " not in once
    assert "\n\n\n" not in once
    assert once == once.strip()
    assert "".join(once.split()) == "".join("".join(text.split()).translate(dict.fromkeys((0x200B, 0xFEFF, 0))).split())


@given(wild, st.integers(1, 20))
def test_splitting_keeps_every_character_in_order(text: str, max_length: int) -> None:
    pieces = list(split_text(text, max_length))
    assert all(len(piece) <= max_length for piece in pieces)
    assert "".join(pieces).replace("\n", "") == text.replace("\n", "")
    if len(text) <= max_length:
        assert pieces == [text]


def test_splitting_happens_at_line_breaks_then_sentences() -> None:
    assert list(split_text("aa\nbb\ncc", 5)) == ["aa\nbb", "cc"]
    assert list(split_text("一二。三四。”五六七八九", 7)) == ["一二。三四。”", "五六七八九"]
    assert list(split_text("abcdefg", 3)) == ["abc", "def", "g"]


def test_length_limits(tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("aaaa\\nbbbb\\nc\nd\n")
    report = build_dataset(source, tmp_path / "out", text=TextOptions(min_length=2, max_length=4))
    assert [record["text"] for record in Dataset(tmp_path / "out")] == ["aaaa", "bbbb"]
    assert (report.records, report.too_short, report.lines) == (2, 2, 2)
    assert build(tmp_path, "aa\\n\\nbb. cc", text=TextOptions(max_length=4)) == [
        {"text": t} for t in ("aa", "bb.", "cc")
    ]
    with pytest.raises(DataError, match="max_length 1 is less than min_length 2"):
        TextOptions(min_length=2, max_length=1)


def test_json_lines_are_kept_as_they_are(tmp_path: Path) -> None:
    records = [{"input": "今天<mask_0>", "<ans>": {"<mask_0>": "a << b"}}, {"a": {"b": {}}}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    assert build(tmp_path, lines, "in.jsonl") == records


BAD_LINES = [
    ('{"a": 1', "not JSON"),
    ("[1]", r"\$: expected a dict, not list"),
    ('{"a": 1}', r"\$\.a: expected a string or a dict, not int"),
    ('{"a": {"b": null}}', r"\$\.a\.b: expected a string or a dict, not NoneType"),
    ('{"a": "x <y"}', r"\$\.a: the `<` at character 2"),
    ('{"a<": "x"}', r"\$\.a<: the `<` at character 1"),
    (r'{"a": "\ud800"}', "holds .* which is no character"),
    ('{"a":' * 70 + '""' + "}" * 70, "nested deeper than 64"),
    ("{" * 100_000, "not JSON"),
    (b"\xff\xfe", "not UTF-8"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_is_named_with_its_reason(tmp_path: Path, line: str | bytes, reason: str) -> None:
    content = b'{"a": "1"}\n' + (line if isinstance(line, bytes) else line.encode()) + b'\n{"a": "2"}\n'
    with pytest.raises(DataError, match=rf"in\.jsonl, line 2: .*{reason}"):
        build(tmp_path, content, "in.jsonl")
    assert not (tmp_path / "out").exists()
    assert build(tmp_path, content, "in.jsonl", skip_bad=True) == [{"a": "1"}, {"a": "2"}]
    source = Dataset(tmp_path / "out").manifest.source
    assert source["bad_lines"] == 1
    assert source["first_bad"].startswith("line 2: ")


def test_escaping(tmp_path: Path) -> None:
    line = '{"a<b>": "1 < 2", "c": {"d": "<x>"}}\n'
    assert build(tmp_path, line, "in.jsonl", escape=True) == [{"a<b>": "1 << 2", "c": {"d": "<<x>"}}]
    with pytest.raises(DataError, match="nested deeper"):
        build(tmp_path, '{"a":' * 500 + '""' + "}" * 500, "in.jsonl", escape=True)


def test_overlong_lines_are_bad_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "MAX_RECORD_BYTES", 100)
    content = "a\n" + "b" * 1000 + "\nc\n"
    with pytest.raises(DataError, match="line 2: longer than 100 bytes"):
        build(tmp_path, content)
    assert build(tmp_path, content, skip_bad=True) == [{"text": "a"}, {"text": "c"}]


@pytest.mark.parametrize("content", ["", "\n \n", "a\n"])
def test_nothing_to_build_from_is_an_error(tmp_path: Path, content: str) -> None:
    with pytest.raises(DataError, match=r"in\.txt: has no record"):
        build(tmp_path, content, text=TextOptions(min_length=2))
    assert not (tmp_path / "out").exists()


def test_a_source_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for source, reason in ((tmp_path / "absent", "No such file"), (tmp_path, "directory"), (Path("a\0"), "no file")):
        with pytest.raises(DataError, match=rf"cannot be read \(.*{reason}"):
            build_dataset(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_leaves_no_data_set_and_the_next_cleans_up(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from cpmbee.train.data import build_dataset
build_dataset(Path("-"), Path({str(tmp_path / "out")!r}), "text")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(b"some text\n" * 100_000)
    process.stdin.flush()
    assert not (tmp_path / "out").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdin.close()
    left = list(tmp_path.iterdir())
    assert all(entry.name.startswith(".out.writing-") for entry in left)
    assert build(tmp_path, "a\n") == [{"text": "a"}]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in.txt", "out"]
