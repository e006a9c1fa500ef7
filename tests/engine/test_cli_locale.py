"""The command line in locales that are not UTF-8: a request is read right or refused, and text can be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cpmbee
from cpmbee.errors import ConfigError
from cpmbee.locale_text import argument_text

REQUEST = '{"input": "今天天气真好", "<ans>": ""}'
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def generate(folder: Path, request: bytes, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    code = b"import sys; from cpmbee.cli import main; sys.exit(main())"
    settings = {key: value for key, value in os.environ.items() if key not in ("PYTHONIOENCODING", "LC_ALL", "LANG")}
    return subprocess.run(
        [sys.executable, "-c", code, "generate", str(folder), request, "--max-new-tokens", "6", *arguments],
        env=settings | environment,
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def expected(small_folder: Path) -> cpmbee.GenerationResult:
    return answered(small_folder)


def answered(folder: Path, **options: Any) -> cpmbee.GenerationResult:
    engine = cpmbee.Engine.from_pretrained(folder, num_threads=1)
    return engine.generate(json.loads(REQUEST), **{"max_new_tokens": 6, **options})


def test_a_request_in_utf8_in_the_c_locale(small_folder: Path, expected: cpmbee.GenerationResult) -> None:
    done = generate(small_folder, REQUEST.encode(), **C_LOCALE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
    printed = json.loads(done.stdout)
    assert printed["answer"] == expected.answer
    assert printed["usage"]["prompt_tokens"] == expected.usage.prompt_tokens


def test_text_in_the_c_locale_is_utf8(small_folder: Path) -> None:
    text = answered(small_folder, temperature=1e4, seed=1, max_new_tokens=60).answer
    assert not str(text).isascii()
    options = ("--temperature", "1e4", "--seed", "1", "--max-new-tokens", "60", "--stream")
    for encoding in ("", "ascii", "latin-1"):
        done = generate(small_folder, REQUEST.encode(), *options, PYTHONIOENCODING=encoding, **C_LOCALE)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.decode("utf-8") == f"{text}\n"
    done = generate(small_folder, REQUEST.encode(), *options, PYTHONIOENCODING="gb18030", **C_LOCALE)
    assert done.stdout.decode("gb18030") == f"{text}\n"  # an encoding that has the characters is kept


@pytest.mark.parametrize("environment", [C_LOCALE, {"LC_ALL": "C.UTF-8"}])
def test_a_request_in_another_encoding_is_refused(small_folder: Path, environment: dict[str, str]) -> None:
    done = generate(small_folder, REQUEST.encode("gbk"), **environment)
    assert done.returncode == 2
    assert b"the request on the command line is not UTF-8; name a file" in done.stderr
    assert done.stdout == b""


@pytest.fixture(scope="module")
def locales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with locales that are not UTF-8."""
    folder = tmp_path_factory.mktemp("locales")
    for name, charmap in (("zh_CN", "GBK"), ("en_US", "ISO-8859-1")):
        command = ["localedef", "-i", name, "-f", charmap, str(folder / f"{name}.{charmap}")]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip(f"this system cannot make the locale {name}.{charmap}")
    return folder


def test_locales_of_other_encodings(small_folder: Path, expected: cpmbee.GenerationResult, locales: Path) -> None:
    gbk, latin = ({"LOCPATH": str(locales), "LC_ALL": name} for name in ("zh_CN.GBK", "en_US.ISO-8859-1"))
    done = generate(small_folder, REQUEST.encode("gbk"), **gbk)
    assert json.loads(done.stdout.decode("gbk"))["answer"] == expected.answer
    done = generate(small_folder, REQUEST.encode(), **latin)  # the terminal has not heard of the locale
    assert done.returncode == 2
    assert b"can be read as UTF-8 and as iso8859-1" in done.stderr
    done = generate(small_folder, '{"input": "é", "<ans>": ""}'.encode("latin-1"), **latin)
    assert json.loads(done.stdout)["usage"]["prompt_tokens"] < expected.usage.prompt_tokens


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "gbk", "euc-jp"])
def test_arguments_are_decoded_right_or_refused(encoding: str) -> None:
    """As Python decodes the arguments of a process: with the locale's encoding, other bytes as lone surrogates."""
    for text in ("plain", "今天", "今天天", "模", "é", "ä中", "\ud800"):
        for sent_as in ("utf-8", encoding):
            try:
                argument = text.encode(sent_as).decode(encoding, "surrogateescape")
            except UnicodeEncodeError:
                continue
            try:
                assert argument_text(argument, encoding) == text
            except ConfigError:
                assert encoding not in ("utf-8", "ascii")
    for text in ("今天", "é\ud800", "ä"):  # given by a program: whatever it is, it is meant
        if not text.isascii():
            assert argument_text(text, "ascii") == text


def test_bytes_that_nobody_can_read_are_refused() -> None:
    for encoding in ("utf-8", "ascii", "gbk"):
        with pytest.raises(ConfigError, match="is not UTF-8"):
            argument_text(b'{"input": "\xff\xfe"}'.decode(encoding, "surrogateescape"), encoding)
    with pytest.raises(ConfigError, match="can be read as UTF-8 and as latin-1"):
        argument_text("今".encode().decode("latin-1"), "latin-1")
