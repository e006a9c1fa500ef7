"""Errors: whatever they are told, they say it in one short line that a terminal can show."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpmbee import errors
from cpmbee.errors import MAX_MESSAGE, CpmBeeError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CpmBeeError)]


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text() | st.builds(lambda text, times: text * times, st.text(max_size=9), st.integers(0, 999)))
def test_any_text_is_one_short_printable_line(kind: type[CpmBeeError], text: str) -> None:
    error = kind(text)
    said = str(error)
    assert said.isprintable()
    assert len(said) <= MAX_MESSAGE
    assert error.args == (said,)
    said.encode("utf-8")
    for same in (kind(said), copy.copy(error), pickle.loads(pickle.dumps(error))):  # noqa: S301
        assert type(same) is kind
        assert str(same) == said


def test_short_printable_texts_stay_as_they_are() -> None:
    for text in ("", "vocab.txt:3: the token '天' is already on line 1", "x" * MAX_MESSAGE, "a  b\\n"):
        assert str(CpmBeeError(text)) == text


def test_control_characters_are_escaped() -> None:
    assert str(CpmBeeError("a\nb\r\tc\x1b[2J\x00\u202e\ud800\u2028d \n")) == r"a\nb\r\tc\x1b[2J\x00\u202e\ud800\u2028d"


def test_long_texts_keep_what_is_wrong_and_what_to_do() -> None:
    for middle in ("y" * 600, "\n" * 300, "y" * 5_000_000):
        said = str(CpmBeeError(f"model.bin: damaged ({middle}); copy it again"))
        assert said.startswith("model.bin: damaged (")
        assert said.endswith("); copy it again")
        assert "..." in said
        assert len(said) == MAX_MESSAGE


def test_what_was_raised_for_a_request_survives_pickling() -> None:
    error = errors.PromptError("request 3: no")
    error.request = 3
    assert pickle.loads(pickle.dumps(error)).request == 3  # noqa: S301
