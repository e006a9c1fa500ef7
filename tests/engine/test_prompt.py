"""Encoding of nested dicts against recorded cases, compiled against plain, and what is refused."""

from __future__ import annotations

import collections
import copy
import dataclasses
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from cpmbee import _prompt, _tokenizer
from cpmbee.encoding import MAX_NESTING, MAX_SEGMENTS, AnswerSlot
from cpmbee.errors import CpmBeeError, PromptError, TokenizeError
from cpmbee.plain import prompt as plain
from cpmbee.plain import tokenizer as plain_tokenizer
from tests.engine.small_vocabulary import TOKENS, tame_text, wild_text
from tests.golden import DATA, GOLDEN, read_jsonl, requires_golden

COMPILED = (_prompt, _tokenizer.Tokenizer(TOKENS))
PLAIN = (plain, plain_tokenizer.Tokenizer(TOKENS))
both = pytest.mark.parametrize(("module", "tokenizer"), [COMPILED, PLAIN], ids=["compiled", "plain"])


def trees(text: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    keys = st.one_of(st.just("<ans>"), text)
    return st.recursive(
        st.dictionaries(keys, text, max_size=4),
        lambda inner: st.dictionaries(keys, st.one_of(text, inner), max_size=4),
        max_leaves=8,
    )


def same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    for field in dataclasses.fields(left):
        ours, theirs = getattr(left, field.name), getattr(right, field.name)
        if isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype, field.name
            np.testing.assert_array_equal(ours, theirs, err_msg=field.name)
        elif isinstance(ours, dict):
            assert list(ours.items()) == list(theirs.items()), field.name
        else:
            assert ours == theirs, field.name


def outcome(call: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return call(*args, **kwargs)
    except CpmBeeError as error:
        return error


def agree(ours: Any, theirs: Any) -> bool:
    """Whether both encoded (then alike); where they refused, they said the same."""
    if isinstance(theirs, CpmBeeError):
        assert (type(ours), str(ours)) == (type(theirs), str(theirs))
        assert "\n" not in str(ours)
        return False
    same(ours, theirs)
    return True


@requires_golden
@pytest.mark.parametrize("module", [_prompt, plain], ids=["compiled", "plain"])
def test_recorded_cases(module: Any) -> None:
    cls = _tokenizer.Tokenizer if module is _prompt else plain_tokenizer.Tokenizer
    tokenizer = cls.from_file(DATA / "bee_vocab.txt")
    for case in read_jsonl(GOLDEN / "encode.jsonl"):
        encoded, expected = module.encode_data(case["data"], tokenizer), case["encoded"]
        assert encoded.num_segments == expected["num_segments"]
        np.testing.assert_array_equal(encoded.input_subs, expected["input_id_subs"])
        for name in ("input_ids", "context", "segment_ids", "segment_rel"):
            np.testing.assert_array_equal(getattr(encoded, name), expected[name], err_msg=name)
        assert encoded.ext_table == {int(key): text for key, text in expected["ext_table"].items()}
        assert encoded.token_id_table == {
            group: {int(key): sub for key, sub in subs.items()} for group, subs in expected["token_id_table"].items()
        }


@settings(deadline=None, max_examples=200)
@given(trees(wild_text), st.lists(trees(wild_text), max_size=2))
def test_implementations_agree_on_requests(data: dict[str, Any], examples: list[dict[str, Any]]) -> None:
    before = copy.deepcopy((data, examples))
    ours = outcome(_prompt.encode_prompt, data, COMPILED[1], examples)
    agree(ours, outcome(plain.encode_prompt, data, PLAIN[1], examples))
    assert (data, examples) == before


@settings(deadline=None, max_examples=100)
@given(trees(tame_text), tame_text, st.lists(trees(tame_text), max_size=2))
def test_implementations_agree_where_nothing_is_refused(
    data: dict[str, Any], answer: str, examples: list[dict[str, Any]]
) -> None:
    data["<ans>"] = answer
    ours = _prompt.encode_prompt(data, COMPILED[1], examples)
    same(ours, plain.encode_prompt(data, PLAIN[1], examples))


@settings(deadline=None, max_examples=100)
@given(trees(wild_text), trees(tame_text), st.integers(0, 9))
def test_implementations_agree_on_training_data(data: dict[str, Any], earlier: dict[str, Any], seed: int) -> None:
    results = []
    for module, tokenizer in (COMPILED, PLAIN):
        previous = module.encode_data(earlier, tokenizer)
        before = copy.deepcopy(previous)
        rng = np.random.default_rng(seed)
        results.append(outcome(module.encode_data, data, tokenizer, previous, rng))
        same(previous, before)
    agree(*results)


@both
def test_answers_are_slots_not_tokens(module: Any, tokenizer: Any) -> None:
    data = {"a": "b", "<ans>": {"one": "", "two": {"three": "ignored <"}}}
    prompt = module.encode_prompt(data, tokenizer)
    assert prompt.answers == (AnswerSlot(("one",), 5), AnswerSlot(("two", "three"), 8))
    assert not {5, 8} & set(prompt.segment_ids.tolist())
    assert prompt.num_segments[0] == 9
    assert len(prompt.segment_rel) == 81
    assert prompt.context.all()
    assert len(prompt) == len(prompt.input_ids)
    single = module.encode_prompt({"<ans>": ""}, tokenizer)
    assert single.answers == (AnswerSlot((), 2),)


@both
def test_groups_subscripts_and_the_extension_vocabulary(module: Any, tokenizer: Any) -> None:
    data = {"<mask_3>": "<我>é<mask_7><mask>", "<ans>": "", "x": "<mask_3><ans_1><ans_2><unk_0>"}
    prompt = module.encode_prompt(data, tokenizer, [{"y": "<mask_9>é", "<ans>": "<option_1>"}])
    mask, unk, option = (tokenizer.token_to_id(name) for name in ("<mask>", "<unk>", "<option>"))
    assert list(prompt.ext_tokens.items()) == [
        ((mask, 0), "<mask_3>"),
        ((mask, 1), "<mask_7>"),
        ((mask, 2), "<mask_9>"),
        ((unk, 0), "<我>"),
        ((unk, 1), "é"),
        ((unk, 2), "x"),
        ((unk, 3), "<unk_0>"),
        ((unk, 4), "y"),
        ((option, 0), "<option_1>"),
    ]
    pairs = list(zip(prompt.input_ids.tolist(), prompt.input_subs.tolist(), strict=True))
    assert (tokenizer.ans_id, 1) in pairs  # <ans_2>, after <ans_1>, which is what the answer would be
    assert prompt.num_samples == 2
    np.testing.assert_array_equal(np.unique(prompt.sample_ids), [0, 1])
    np.testing.assert_array_equal(prompt.positions, np.arange(len(prompt)))
    np.testing.assert_array_equal(np.unique(prompt.rel_offset), [0, 49])


@both
def test_segment_buckets_stop_at_the_depth_that_they_tell_apart(module: Any, tokenizer: Any) -> None:
    data: Any = ""
    for _ in range(12):
        data = {"a": data}
    encoded = module.encode_data(data, tokenizer)
    table = encoded.segment_rel.reshape(encoded.num_segments, -1)
    assert table[0, 1] == 2
    assert table[0, -1] == 8
    assert table[-1, 0] == 57
    assert table.max() <= 65
    assert (np.diag(table) == 0).all()


@both
def test_shuffling_reorders_answers_only(module: Any, tokenizer: Any) -> None:
    data = {"a": {str(i): "b" for i in range(8)}, "<ans>": {"ab"[: i % 2 + 1] * (i + 1): "天" for i in range(8)}}
    still = module.encode_data(data, tokenizer)
    shuffled = module.encode_data(data, tokenizer, rng=np.random.default_rng(1))
    assert sorted(still.input_ids) == sorted(shuffled.input_ids)
    assert (still.input_ids != shuffled.input_ids).any()
    assert (still.input_ids[:30] == shuffled.input_ids[:30]).all()


class Text(str):
    __slots__ = ()


@both
def test_subclasses_of_dict_and_str_are_welcome(module: Any, tokenizer: Any) -> None:
    ordered = collections.OrderedDict([("<ans>", Text("")), (Text("a"), Text("天"))])
    ordered.move_to_end("<ans>")
    same(module.encode_prompt(ordered, tokenizer), module.encode_prompt({"a": "天", "<ans>": ""}, tokenizer))


def circle() -> dict[str, Any]:
    data: dict[str, Any] = {"<ans>": ""}
    data["a"] = data
    return data


def nested(depth: int) -> dict[str, Any]:
    data: dict[str, Any] = {"a": ""}
    for _ in range(depth - 1):
        data = {"a": data}
    return data


REFUSED = {
    "no answer": ({"a": "b"}, PromptError, r"^\$: has no \"<ans>\" key"),
    "an empty answer": ({"a": "b", "<ans>": {}}, PromptError, r"^\$\.<ans>: holds no answer"),
    "answers without leaves": ({"<ans>": {"a": {}, "b": {}}}, PromptError, r"^\$\.<ans>: holds no answer"),
    "a list": ([{"<ans>": ""}], PromptError, r"^\$: expected a dict, not list"),
    "text": ("<ans>", PromptError, r"^\$: expected a dict, not str"),
    "a number as key": ({"<ans>": "", "a": {5: "x"}}, PromptError, r"^\$\.a: has a key of type int"),
    "a number as leaf": ({"<ans>": "", "a": {"b": 5}}, PromptError, r"^\$\.a\.b: .*not int"),
    "null as leaf": ({"<ans>": {"x": None}}, PromptError, r"^\$\.<ans>\.x: .*not NoneType"),
    "a list as leaf": ({"<ans>": "", "a": ["b"]}, PromptError, r"^\$\.a: .*not list"),
    "bytes as leaf": ({"<ans>": "", "a": b"b"}, PromptError, r"^\$\.a: .*not bytes"),
    "an unclosed special": (
        {"<ans>": "", "options": {"<option_2>": "ab<c"}},
        TokenizeError,
        r"^\$\.options\.<option_2>: the `<` at character 2 .*Tokenizer\.escape",
    ),
    "an unclosed special in a key": ({"<ans>": "", "a<": "b"}, TokenizeError, r"^\$\.a<: .*character 1"),
    "deep nesting": ({"<ans>": "", "b": nested(MAX_NESTING)}, PromptError, r"^\$\.b\.a\..*deeper than 64"),
    "absurdly deep nesting": (nested(100_000), PromptError, r"deeper than 64"),
    "a dict that holds itself": (circle(), PromptError, r"^\$\.a\.a\..*deeper than 64"),
    "too many segments": ({str(i): "" for i in range(MAX_SEGMENTS // 2)}, PromptError, r"^\$: more than 1024 segments"),
    "a key that is not printable": ({"<ans>": "", "a\nb\ud800": 5}, PromptError, r"^\$\.'a\\nb\\ud800': "),
    "a key of a million characters": ({"<ans>": "", "a" * 10**6: 5}, PromptError, r"^\$\.a{37}\.\.\.: "),
}


@both
@pytest.mark.parametrize(("data", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(module: Any, tokenizer: Any, data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        module.encode_prompt(data, tokenizer)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    if error is not PromptError or "<ans>" not in message:
        with pytest.raises(error, match=message.replace(r"^\$", r"^examples\[1\]")):
            module.encode_prompt({"<ans>": ""}, tokenizer, [{"a": "b", "<ans>": ""}, data])


@both
def test_the_limits_themselves_are_allowed(module: Any, tokenizer: Any) -> None:
    assert module.encode_data(nested(MAX_NESTING), tokenizer).num_segments == MAX_NESTING + 2
    wide = {str(i): "" for i in range(MAX_SEGMENTS // 2 - 1)}
    assert module.encode_data(wide, tokenizer).num_segments == MAX_SEGMENTS - 1


def test_the_compiled_encoder_wants_the_compiled_tokenizer() -> None:
    with pytest.raises(PromptError, match=r"tokenizer: .*not cpmbee\.plain"):
        _prompt.encode_prompt({"<ans>": ""}, PLAIN[1])


def test_a_long_request() -> None:
    text = "天é<x_1>" * 50_000
    prompt = _prompt.encode_prompt({"a": text, "<ans>": ""}, COMPILED[1])
    assert len(prompt) == 150_000 + 11
    assert len(prompt.ext_tokens) == 2
