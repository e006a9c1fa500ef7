"""The tokenizer against recorded cases, against a naive one, and compiled against plain."""

from __future__ import annotations

import copy
import pickle
import time
from typing import Any

import pytest
from hypothesis import given, settings

from cpmbee import _tokenizer
from cpmbee.errors import TokenizeError
from cpmbee.plain import tokenizer as plain
from tests.engine.small_vocabulary import TOKENS, tame_text, vocabularies, wild_text
from tests.golden import DATA, GOLDEN, read_jsonl, requires_golden

IMPLEMENTATIONS = [_tokenizer.Tokenizer, plain.Tokenizer]
both = pytest.mark.parametrize("cls", IMPLEMENTATIONS, ids=["compiled", "plain"])
COMPILED, PLAIN = (cls(TOKENS) for cls in IMPLEMENTATIONS)


def naive_encode(tokens: tuple[str, ...], text: str) -> tuple[list[int], dict[int, str]]:
    """Longest match by slicing, after a pass over the characters that takes specials out; shares no code."""
    vocabulary = {{"</n>": "\n", "</_>": " "}.get(token, token): i for i, token in enumerate(tokens)}
    special = {token for token in vocabulary if token.startswith("<") and token.endswith(">") and len(token) > 1}
    parts, inside, after_less_than = [""], False, False
    for c in text:
        if inside:
            if c == "<":
                raise ValueError(text)
            parts[-1] += c
            if c == ">":
                inside = False
                parts.append("")
        elif after_less_than:
            after_less_than = False
            if c == "<":
                parts[-1] += c
            else:
                parts.append("<" + c)
                inside = True
        elif c == "<":
            after_less_than = True
        else:
            parts[-1] += c
    if inside or after_less_than:
        raise ValueError(text)
    pieces: list[tuple[str, bool]] = []
    for index, part in enumerate(parts):
        if index % 2:
            pieces.append((part, part in vocabulary))
            continue
        unknown = ""
        while part:
            size = next((n for n in range(len(part), 0, -1) if part[:n] in vocabulary and part[:n] not in special), 0)
            if not size:
                unknown, part = unknown + part[0], part[1:]
                continue
            if unknown:
                pieces.append((unknown, False))
            unknown = ""
            pieces.append((part[:size], True))
            part = part[size:]
        if unknown:
            pieces.append((unknown, False))
    ids, table = [], {}
    for piece, known in pieces:
        if not known:
            table.setdefault(piece, len(vocabulary) + len(table))
        ids.append(vocabulary[piece] if known else table[piece])
    return ids, {i: piece for piece, i in table.items()}


def outcome(encode: Any, *args: Any) -> Any:
    try:
        return encode(*args)
    except ValueError as error:
        return type(error), str(error)


@requires_golden
@both
def test_recorded_cases(cls: type[Any]) -> None:
    tokenizer = cls.from_file(DATA / "bee_vocab.txt")
    for case in read_jsonl(GOLDEN / "tokenizer.jsonl"):
        if "error" in case:
            with pytest.raises(TokenizeError, match="character"):
                tokenizer.encode(case["text"])
            continue
        ids, table = tokenizer.encode(case["text"])
        assert ids == case["ids"]
        assert table == {int(key): text for key, text in case["ext_table"].items()}
        assert tokenizer.decode(ids, table) == case["decoded"]


@settings(deadline=None, max_examples=300)
@given(wild_text)
def test_implementations_agree(text: str) -> None:
    assert outcome(COMPILED.encode, text) == outcome(PLAIN.encode, text)


@settings(deadline=None, max_examples=150)
@given(vocabularies, wild_text)
def test_implementations_and_the_naive_one_agree_on_any_vocabulary(tokens: tuple[str, ...], text: str) -> None:
    compiled = outcome(_tokenizer.Tokenizer(tokens).encode, text)
    assert compiled == outcome(plain.Tokenizer(tokens).encode, text)
    try:
        assert compiled == naive_encode(tokens, text)
    except ValueError:
        assert compiled[0] is TokenizeError


@settings(deadline=None, max_examples=150)
@given(wild_text)
def test_escaped_text_comes_back(text: str) -> None:
    for tokenizer in (COMPILED, PLAIN):
        escaped = tokenizer.escape(text)
        assert tokenizer.decode(*tokenizer.encode(escaped)) == escaped
        assert tokenizer.unescape(escaped) == text


@settings(deadline=None, max_examples=100)
@given(tame_text, tame_text)
def test_earlier_ids_keep_their_meaning(first: str, second: str) -> None:
    for tokenizer in (COMPILED, PLAIN):
        _, table = tokenizer.encode(first)
        before = dict(table)
        ids, longer = tokenizer.encode(second, table)
        assert table == before
        assert {key: longer[key] for key in before} == before
        assert tokenizer.decode(ids, longer) == second


@both
def test_escape_inside_tokens_and_unknown_runs(cls: type[Any]) -> None:
    tokenizer = cls(TOKENS)
    assert tokenizer.encode("<<a")[0] == [TOKENS.index("<a")]
    assert tokenizer.encode(" <<<<")[0] == [TOKENS.index(" <<")]
    without = cls([token for token in TOKENS if "<" not in token or token.endswith(">")])
    assert without.encode("é<<é") == ([without.vocab_size], {without.vocab_size: "é<é"})


@both
def test_plain_text_never_becomes_a_special_token(cls: type[Any]) -> None:
    tokenizer = cls([entry for entry in TOKENS if entry != "<"])
    ids, _ = tokenizer.encode("<<mask>")
    assert tokenizer.mask_id not in ids


@both
def test_new_ids_avoid_those_of_the_caller(cls: type[Any]) -> None:
    tokenizer = cls(TOKENS)
    taken = {tokenizer.vocab_size + 1: "é"}
    ids, table = tokenizer.encode("éxé", taken)
    assert table[ids[0]] == "éxé"
    assert table[tokenizer.vocab_size + 1] == "é"


@both
@pytest.mark.parametrize(
    ("text", "offset"), [("<", 0), ("a<", 1), ("<<<", 2), ("天<mask", 1), ("a<b<c>", 1), ("<>", 0), ("<mask><", 6)]
)
def test_unclosed_special_names_the_offset_and_the_cure(cls: type[Any], text: str, offset: int) -> None:
    with pytest.raises(TokenizeError, match=rf"at character {offset} .*Tokenizer\.escape") as caught:
        cls(TOKENS).encode(text)
    assert "\n" not in str(caught.value)


@both
def test_lone_surrogates_are_unknown_characters(cls: type[Any]) -> None:
    tokenizer = cls(TOKENS)
    ids, table = tokenizer.encode("a\ud800a<\udfff>")
    assert list(table.values()) == ["\ud800", "<\udfff>"]
    assert tokenizer.decode(ids, table) == "a\ud800a<\udfff>"


@both
@pytest.mark.parametrize("ids", [[-1], [len(TOKENS)], [3, 10**6]])
def test_decode_names_an_id_that_nobody_gave_out(cls: type[Any], ids: list[int]) -> None:
    with pytest.raises(TokenizeError, match=str(ids[-1])):
        cls(TOKENS).decode(ids)


@both
def test_decode_prefers_the_ext_table(cls: type[Any]) -> None:
    tokenizer = cls(TOKENS)
    assert tokenizer.decode([tokenizer.unk_id, TOKENS.index("<")], {tokenizer.unk_id: "é"}) == "é<<"


@both
def test_lookups(cls: type[Any]) -> None:
    tokenizer = cls(TOKENS)
    assert tokenizer.vocab_size == len(tokenizer.tokens) == len(TOKENS)
    for name in ("pad", "unk", "mask", "root", "ans"):
        assert getattr(tokenizer, f"{name}_id") == TOKENS.index(f"<{name}>")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (TOKENS.index("<s>"), TOKENS.index("</s>"))
    assert tokenizer.token_to_id("\n") == TOKENS.index("</n>")
    assert tokenizer.token_to_id("</n>") is None
    assert tokenizer.id_to_token(TOKENS.index("</_>")) == " "
    with pytest.raises(TokenizeError, match="not in the vocabulary"):
        tokenizer.id_to_token(-1)
    assert repr(tokenizer) == f"Tokenizer(<{len(TOKENS)} tokens>)"


@both
def test_a_copy_encodes_alike(cls: type[Any]) -> None:
    tokenizer = cls(TOKENS)
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):  # noqa: S301
        assert other.encode("今天abcé<mask>\n") == tokenizer.encode("今天abcé<mask>\n")


@pytest.mark.parametrize("text", ["é", "<" + "a", "abcdx", "<<"], ids=["unknown", "special", "backtracking", "escape"])
def test_time_grows_in_step_with_the_text(text: str) -> None:
    def seconds(repeats: int) -> float:
        whole = text * repeats if text != "<a" else "<" + "a" * repeats + ">"
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            COMPILED.encode(whole)
            best = min(best, time.perf_counter() - start)
        return best

    assert seconds(320_000) < 60 * seconds(20_000)  # quadratic would be 256 times
