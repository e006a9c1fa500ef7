"""Vocabulary files that are wrong, each with one line that names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cpmbee import _tokenizer, vocabulary
from cpmbee.errors import VocabularyError
from cpmbee.plain import tokenizer as plain
from tests.engine.small_vocabulary import TOKENS

both = pytest.mark.parametrize("cls", [_tokenizer.Tokenizer, plain.Tokenizer], ids=["compiled", "plain"])


def write(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "vocab.txt"
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return path


@both
def test_empty_lines_and_windows_line_ends_do_not_count(cls: type[Any], tmp_path: Path) -> None:
    path = write(tmp_path, "", *(f"{token}\r" for token in TOKENS), "")
    assert cls.from_file(path).tokens == TOKENS


@both
def test_a_repeated_token_is_named_with_its_lines(cls: type[Any], tmp_path: Path) -> None:
    path = write(tmp_path, *TOKENS, "", "天")
    with pytest.raises(VocabularyError, match=rf"vocab\.txt:{len(TOKENS) + 2}: .*'天'.* line {TOKENS.index('天') + 1}"):
        cls.from_file(path)


@both
@pytest.mark.parametrize("token", ["<pad>", "<unk>", "<mask>", "<s>", "</s>", "<root>", "<ans>", "</n>", "</_>"])
def test_a_missing_special_is_named(cls: type[Any], tmp_path: Path, token: str) -> None:
    path = write(tmp_path, *(known for known in TOKENS if known != token))
    with pytest.raises(VocabularyError, match=rf"vocab\.txt: lacks {token};"):
        cls.from_file(path)


@both
def test_bytes_that_are_not_utf8_are_named_by_line(cls: type[Any], tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match=r"vocab\.txt:2: not UTF-8"):
        cls.from_file(write(tmp_path, "<pad>", b"\xff\xfe", *TOKENS))


@both
def test_an_absurd_file_is_refused(cls: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VocabularyError, match=r"vocab\.txt:1: a token of 513 characters"):
        cls.from_file(write(tmp_path, "x" * 513, *TOKENS))
    monkeypatch.setattr(vocabulary, "MAX_FILE_BYTES", 1 << 20)
    with pytest.raises(VocabularyError, match=r"vocab\.txt: larger than 1 MiB"):
        cls.from_file(write(tmp_path, *TOKENS, "x" * (1 << 20)))


@both
def test_too_many_tokens_are_refused_early(cls: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "MAX_TOKENS", len(TOKENS))
    assert cls.from_file(write(tmp_path, *TOKENS)).vocab_size == len(TOKENS)
    with pytest.raises(VocabularyError, match=rf"vocab\.txt:{len(TOKENS) + 1}: more than {len(TOKENS)} tokens"):
        cls.from_file(write(tmp_path, *TOKENS, "more"))


@both
def test_an_absent_file_is_named(cls: type[Any], tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match=r"nowhere\.txt: cannot read"):
        cls.from_file(tmp_path / "nowhere.txt")


@both
@pytest.mark.parametrize(
    ("extra", "message"),
    [("", "1 to 512"), (5, "must be a string, not int"), ("天", "repeats '天'"), ("\n", r"repeats '\\n'")],
)
def test_unusable_tokens(cls: type[Any], extra: Any, message: str) -> None:
    with pytest.raises(VocabularyError, match=message):
        cls([*TOKENS, extra])
