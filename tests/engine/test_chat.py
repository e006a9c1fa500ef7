"""Dialogue: turns go into the input, the user's text is escaped, streams are remembered."""

from __future__ import annotations

from pathlib import Path

import pytest

import cpmbee


@pytest.fixture
def chat(small_folder: Path) -> cpmbee.Chat:
    engine = cpmbee.Engine.from_pretrained(small_folder, num_threads=1)
    return cpmbee.Chat(engine, max_new_tokens=8)


def test_turns_are_remembered(chat: cpmbee.Chat) -> None:
    first = chat.send("你好 a<b")
    assert isinstance(first.answer, str)
    assert chat.request("好")["input"] == f"<用户>你好 a<<b<AI>{first.answer}<用户>好<AI>"
    assert chat.request("好")["<ans>"] == ""
    chat.send("好")
    assert [turn.user for turn in chat.turns] == ["你好 a<b", "好"]
    chat.reset()
    assert chat.request("x")["input"] == "<用户>x<AI>"


def test_streams_are_remembered(chat: cpmbee.Chat) -> None:
    stream = chat.stream("今天", temperature=2.0, seed=1)
    text = "".join(piece.text for piece in stream)
    assert stream.result.answer == text == chat.turns[0].reply
    with chat.stream("天气", max_new_tokens=30) as early:
        next(early, None)
    assert len(chat.turns) == 2
    assert chat.turns[1].reply == (early.result.answer or "")


def test_only_the_last_turns_are_seen(small_folder: Path) -> None:
    engine = cpmbee.Engine.from_pretrained(small_folder, num_threads=1)
    chat = cpmbee.Chat(engine, user="<u>", assistant="<m>", fields={"prompt": "abc"}, max_turns=1, max_new_tokens=1)
    for text in ("a", "b", "c"):
        chat.send(text)
    request = chat.request("d")
    assert request["input"] == f"<u>c<m>{chat.turns[-1].reply}<u>d<m>"
    assert list(request) == ["input", "prompt", "<ans>"]


def test_bad_options_show_at_once(chat: cpmbee.Chat) -> None:
    engine = chat._engine
    with pytest.raises(cpmbee.ConfigError, match="unknown generation option"):
        cpmbee.Chat(engine, beam=3)
    with pytest.raises(cpmbee.ConfigError, match="max_turns"):
        cpmbee.Chat(engine, max_turns=-1)
    with pytest.raises(cpmbee.ConfigError):
        chat.send("a", max_new_tokens=0)
    assert chat.turns == []


def test_a_conversation_that_outgrows_the_cache_forgets_its_oldest_turns(small_folder: Path) -> None:
    engine = cpmbee.Engine.from_pretrained(small_folder, num_threads=1, cache_tokens=80)
    chat = cpmbee.Chat(engine, fields={"prompt": "好好说话"}, max_new_tokens=8)
    for number in range(12):
        chat.send(f"第{number}句 今天天气真好")
    assert len(chat.turns) == 12
    assert 0 < chat.forgotten < 11
    request = chat.request("好")
    assert request["prompt"] == "好好说话"
    seen = [turn.user in request["input"] for turn in chat.turns]
    first = seen.index(True)
    assert seen == [False] * first + [True] * (12 - first)
    assert request["input"].startswith(f"<用户>{chat.turns[first].user}<AI>")
    with_one_more = {
        **request,
        "input": f"<用户>{chat.turns[first - 1].user}<AI>{chat.turns[first - 1].reply}" + request["input"],
    }
    assert engine.cache_rows(request, max_new_tokens=8) <= 80 < engine.cache_rows(with_one_more, max_new_tokens=8)
    # A smaller budget leaves room for more of the past, a larger one for less.
    sizes = [len(chat.request("好", max_new_tokens=budget)["input"]) for budget in (1, 8, 40)]
    assert sizes[0] >= sizes[1] > sizes[2]
    with chat.stream("好", max_new_tokens=40):
        assert chat.forgotten > first
    with pytest.raises(cpmbee.CacheFullError, match="cache rows"):
        chat.send("好" * 80)
    assert len(chat.turns) == 13
    chat.reset()
    assert chat.forgotten == 0
