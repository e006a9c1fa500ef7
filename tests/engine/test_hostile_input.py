"""Hostile text, dicts and arrays: both implementations refuse alike, in one line, and no call ends the process."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from cpmbee import _prompt, _relation, _tokenizer
from cpmbee.encoding import EncodedData
from cpmbee.errors import CpmBeeError, PromptError, TokenizeError, VocabularyError
from cpmbee.plain import logits as plain_logits
from cpmbee.plain import prompt as plain_prompt
from cpmbee.plain import relation as plain_relation
from cpmbee.plain import tokenizer as plain_tokenizer
from tests.engine import hostile
from tests.engine.hostile import Changing, Number, OddItems, Text
from tests.engine.relation_cases import SMALL, columns_with
from tests.engine.small_vocabulary import TOKENS, wild_text

TOKENIZERS = (_tokenizer.Tokenizer, plain_tokenizer.Tokenizer)
COMPILED, PLAIN = ((module, cls(TOKENS)) for module, cls in zip((_prompt, plain_prompt), TOKENIZERS, strict=True))
both_tokenizers = pytest.mark.parametrize("cls", TOKENIZERS, ids=["compiled", "plain"])
both_prompts = pytest.mark.parametrize(("module", "tokenizer"), [COMPILED, PLAIN], ids=["compiled", "plain"])
both_relations = pytest.mark.parametrize("module", [_relation, plain_relation], ids=["compiled", "plain"])
ROOT = Path(__file__).resolve().parents[2]

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 40), st.integers(-(2**70), 2**70), st.just(-(10**4000)), st.floats(),
    wild_text, wild_text.map(Text), st.binary(max_size=3),
    st.sampled_from([np.int64(3), np.float32(1), np.bool_(True)]),
)  # fmt: skip
tables = st.dictionaries(st.one_of(st.integers(-3, 70), scalars), st.one_of(wild_text, scalars), max_size=3)
anything = st.one_of(scalars, tables, st.lists(scalars, max_size=3), st.just(np.zeros((2, 2))))
requests = st.recursive(
    scalars,
    lambda inner: st.dictionaries(st.one_of(wild_text, st.just("<ans>"), scalars), inner, max_size=4).flatmap(
        lambda items: st.sampled_from([dict, Changing]).map(lambda kind: kind(items))
    ),
    max_leaves=8,
)


def outcome(call: Any, *args: Any) -> Any:
    try:
        return call(*args)
    except CpmBeeError as error:
        hostile.require_one_line(error)
        return type(error), str(error)


def as_lists(encoded: Any) -> Any:
    names = getattr(encoded, "__slots__", None)
    if not names:
        return encoded
    fields = (getattr(encoded, name) for name in names)
    return [field.tolist() if isinstance(field, np.ndarray) else field for field in fields]


@settings(deadline=None, max_examples=300)
@given(anything, st.one_of(st.none(), tables, anything))
def test_tokenizers_refuse_alike(value: Any, table: Any) -> None:
    for name in ("encode", "decode"):
        ours, theirs = (outcome(getattr(tokenizer, name), value, table) for _, tokenizer in (COMPILED, PLAIN))
        assert ours == theirs
    for name in ("id_to_token", "token_to_id", "escape", "unescape"):
        ours, theirs = (outcome(getattr(tokenizer, name), value) for _, tokenizer in (COMPILED, PLAIN))
        assert ours == theirs
    ours, theirs = (outcome(cls, [*TOKENS, value]) for cls in TOKENIZERS)
    assert ours == theirs or (ours.tokens == theirs.tokens and ours.encode("é")[0] == theirs.encode("é")[0])


@settings(deadline=None, max_examples=200)
@given(requests, st.one_of(st.just(()), st.lists(requests, max_size=2), scalars))
def test_encoders_refuse_alike(data: Any, examples: Any) -> None:
    ours, theirs = (outcome(module.encode_prompt, data, t, examples) for module, t in (COMPILED, PLAIN))
    assert as_lists(ours) == as_lists(theirs)
    ours, theirs = (outcome(module.encode_data, data, t) for module, t in (COMPILED, PLAIN))
    assert as_lists(ours) == as_lists(theirs)


@settings(deadline=None, max_examples=200)
@given(tables, st.dictionaries(wild_text, tables, max_size=3))
def test_tables_of_an_earlier_sample_are_checked(table: Any, groups: Any) -> None:
    earlier = EncodedData(*([np.zeros(1, np.int32)] * 5), 1, table, groups)  # type: ignore[arg-type]
    ours, theirs = (outcome(m.encode_data, {"a": "é<x>"}, t, earlier) for m, t in (COMPILED, PLAIN))
    assert as_lists(ours) == as_lists(theirs)


@settings(deadline=None, max_examples=200)
@given(st.lists(anything, min_size=5, max_size=5))
def test_layouts_refuse_alike(given_: list[Any]) -> None:
    def columns(module: Any) -> Any:
        layout = module.TokenLayout(columns_with(), np.zeros(4, np.int32))
        layout.append(*given_)
        return layout.columns.tolist()

    def change(module: Any, name: str) -> Any:
        layout = module.TokenLayout(columns_with(), np.zeros(4, np.int32))
        changed = getattr(layout, name)(given_[0])
        return [] if changed is None else changed.columns.tolist()

    def fill(module: Any) -> Any:
        layout = module.TokenLayout(columns_with(), np.zeros(4, np.int32))
        module.RelationBuilder(SMALL).fill(np.empty((3, 3), np.int16), layout, given_[0])

    for call in (lambda m: m.TokenLayout(*given_[:2]), columns, fill):
        if not isinstance(given_[2], np.ndarray):  # whose truth is nobody's business
            assert outcome_of(call, _relation) == outcome_of(call, plain_relation)
    for name in ("truncate", "take"):
        assert outcome_of(change, _relation, name) == outcome_of(change, plain_relation, name)


def outcome_of(call: Any, *args: Any) -> Any:
    try:
        result = outcome(call, *args)
    except ValueError as error:  # of arrays of another shape
        return str(error)
    return result if isinstance(result, (list, tuple)) else None


@both_tokenizers
def test_ids_that_are_none(cls: Any) -> None:
    tokenizer = cls(TOKENS)
    for token_id, message in [
        (-1, "token id -1 "), (10**30, "of 100 bits"), (-(10**5000), "of 16610 bits"), (2**63, "9223372036854775808"),
        ("a", "integers, not str"), (1.0, "integers, not float"), (None, "integers, not NoneType"),
    ]:  # fmt: skip
        for call in (tokenizer.id_to_token, lambda i: tokenizer.decode([i])):
            with pytest.raises(TokenizeError, match=message):
                call(token_id)
    for table in ({-5: "é"}, {2**31: "é"}, {"1": "é"}, {1: 2}, {1.5: "é"}, 5, "ab", [1]):
        for call in (tokenizer.encode, tokenizer.decode):
            with pytest.raises(TokenizeError, match="ext_table: expected a dict"):
                call("é", table)
    with pytest.raises(TokenizeError, match="list of token ids, not int"):
        tokenizer.decode(5)
    assert tokenizer.decode([np.int64(15), True]) == tokenizer.decode([15, 1])


@both_tokenizers
def test_an_object_without_its_init_refuses(cls: Any) -> None:
    class SkipsInit(cls):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

    for empty in (SkipsInit(), cls.__new__(cls)):
        for call in (
            lambda e=empty: e.encode("a"),
            lambda e=empty: e.decode([1]),
            lambda e=empty: e.decode([]),
            lambda e=empty: e.id_to_token(0),
            lambda e=empty: e.token_to_id("a"),
            lambda e=empty: (_prompt if cls is _tokenizer.Tokenizer else plain_prompt).encode_prompt({"<ans>": ""}, e),
        ):
            with pytest.raises(TokenizeError, match="its __init__ was not called"):
                call()
        assert (empty.vocab_size, empty.tokens) == (0, ())
        assert repr(empty)
    with pytest.raises(VocabularyError):
        copy.copy(cls.__new__(cls))
    failed = cls.__new__(cls)
    with pytest.raises(VocabularyError):
        failed.__init__(["a"])
    with pytest.raises(TokenizeError):
        failed.encode("a")
    failed.__init__(TOKENS)  # which may be tried again, but not repeated
    assert failed.encode("a") == cls(TOKENS).encode("a")
    with pytest.raises(RuntimeError, match="built once"):
        failed.__init__(TOKENS)


@both_tokenizers
@pytest.mark.parametrize("tokens", [None, 5, [None], [1], [*TOKENS, None], {"a": 1}, "abc", []])
def test_vocabularies_that_are_none(cls: Any, tokens: Any) -> None:
    with pytest.raises(VocabularyError):
        cls(tokens)


@both_tokenizers
def test_a_vocabulary_is_read_once(cls: Any) -> None:
    assert cls(iter(TOKENS)).tokens == TOKENS
    assert cls([*TOKENS, Text("zz")]).encode("zz") == ([len(TOKENS)], {})

    class Nested(list[str]):
        def __iter__(self) -> Any:  # builds the tokenizer while it is being built
            tokenizer.__init__(TOKENS)
            return iter(TOKENS)

    tokenizer = cls.__new__(cls)
    with pytest.raises(RuntimeError, match="built once"):
        tokenizer.__init__(Nested())
    assert tokenizer.encode("a<mask>")[1] == {}


def test_a_trie_lives_as_long_as_who_reads_it() -> None:
    class Elsewhere(_tokenizer.Tokenizer):
        @property
        def trie_capsule(self) -> object:
            return _tokenizer.Tokenizer((*TOKENS, "zzz")).trie_capsule

    expected = _prompt.encode_prompt({"<ans>": "", "a": "zzz<mask>"}, COMPILED[1])
    prompt = _prompt.encode_prompt({"<ans>": "", "a": "zzz<mask>"}, Elsewhere(TOKENS))
    np.testing.assert_array_equal(prompt.input_ids, expected.input_ids)


@both_prompts
def test_a_dict_is_encoded_as_it_was_when_it_was_reached(module: Any, tokenizer: Any) -> None:
    """Each of these frees or changes what is being walked, at the moment when code of the request runs."""
    lazy = Changing(a="b")
    inner = {"lazy": lazy, "x": "天", "y": "天" * 50}
    root = {"n": inner, "last": "b", "<ans>": ""}
    expected = module.encode_prompt(copy.deepcopy(root), tokenizer)

    def free() -> None:
        root.clear()
        inner.clear()
        root.update({f"k{i}": {"z": "a" * i} for i in range(100)})
        gc.collect()

    lazy.change = free
    assert as_lists(module.encode_prompt(root, tokenizer)) == as_lists(expected)
    assert "<ans>" not in root


@both_prompts
def test_a_dict_that_changes_while_it_is_read_is_refused(module: Any, tokenizer: Any) -> None:
    class Growing(dict[str, str]):
        def items(self) -> Any:
            for key, value in super().items():
                self[key + "!"] = "a"
                yield key, value

    with pytest.raises(PromptError, match=r"^\$\.n: changed while it was encoded \(dictionary changed size"):
        module.encode_prompt({"n": Growing(a="b"), "<ans>": ""}, tokenizer)


@both_prompts
def test_odd_items_and_errors_of_the_caller(module: Any, tokenizer: Any) -> None:
    def encode(items: Any) -> Any:
        return module.encode_prompt({"n": OddItems({None: items}), "<ans>": ""}, tokenizer)

    for items in ([1], [("a",)], [("a", "b", "c")], [None]):
        with pytest.raises(PromptError, match=r"^\$\.n: a dict whose items"):
            encode(items)
    with pytest.raises(PromptError, match="more than 1024 segments"):
        encode(hostile.endless())

    class Broken(dict[str, str]):
        def items(self) -> Any:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        module.encode_prompt(Broken(), tokenizer)


@both_prompts
def test_text_is_its_characters_whatever_its_class_says(module: Any, tokenizer: Any) -> None:
    assert as_lists(module.encode_prompt({Text("<ans>"): Text(""), Text("a"): Text("天<x>")}, tokenizer)) == as_lists(
        module.encode_prompt({"<ans>": "", "a": "天<x>"}, tokenizer)
    )


@both_prompts
def test_arguments_that_are_something_else(module: Any, tokenizer: Any) -> None:
    data = {"<ans>": ""}
    for call, message in [
        (lambda: module.encode_prompt(data, None), "tokenizer: expected"),
        (lambda: module.encode_prompt(data, tokenizer, 5), "examples: expected a list of dicts, not int"),
        (lambda: module.encode_data(data, tokenizer, None, 5), "rng: expected a numpy.random.Generator, not int"),
        (lambda: module.encode_data(data, tokenizer, 5), "previous: expected what encode_data returned"),
    ]:
        with pytest.raises(PromptError, match=message):
            call()


@both_relations
def test_layouts_and_builders_without_their_init(module: Any) -> None:
    empty = module.TokenLayout.__new__(module.TokenLayout)
    assert empty.columns.shape == (7, 0)
    assert (len(empty), len(empty.copy()), len(empty.take([]))) == (0, 0, 0)
    builder = module.RelationBuilder(SMALL)
    builder.fill(np.empty((0, 4), np.int16), empty)
    with pytest.raises(PromptError, match="no tokens"):
        empty.append(0, 0)
    layout = module.TokenLayout(columns_with(), np.zeros(4, np.int32))
    unset = module.RelationBuilder.__new__(module.RelationBuilder)
    with pytest.raises(CpmBeeError, match="no configuration"):
        unset.fill(np.empty((3, 3), np.int16), layout)
    for wrong in (None, 5, {"position_bias_num_buckets": -1}):
        with pytest.raises(CpmBeeError, match="expected a ModelConfig"):
            module.RelationBuilder(wrong)
    for other in (None, 5):
        with pytest.raises(PromptError, match="expected a TokenLayout"):
            builder.fill(np.empty((3, 3), np.int16), other)
    with pytest.raises(PromptError, match="outside"):
        layout.__init__(columns_with(segment=5), np.zeros(1, np.int32))
    assert len(layout) == 0  # nothing is left that belongs to another table


@both_relations
def test_copies_and_pickles_are_independent(module: Any) -> None:
    layout = module.TokenLayout(columns_with(), np.zeros(4, np.int32))
    builder = module.RelationBuilder(SMALL)
    for other in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout), copy.copy(layout)):  # noqa: S301
        before = layout.columns.copy()
        other.append(1, 9)
        np.testing.assert_array_equal(layout.columns, before)
        assert len(other) == 4
    rows = [np.empty((3, 3), np.int16) for _ in range(2)]
    for out, made in zip(rows, (builder, pickle.loads(pickle.dumps(builder))), strict=True):  # noqa: S301
        made.fill(out, layout)
    np.testing.assert_array_equal(*rows)


@both_relations
@pytest.mark.parametrize(
    "wrong",
    [np.full((7, 2), 2**40), np.zeros((7, 2)), np.full((7, 2), np.nan), [["0", "0"]] * 7, [[2**40] * 2] * 7, None],
)
def test_numbers_are_not_cut_to_fit(module: Any, wrong: Any) -> None:
    with pytest.raises(PromptError, match="token columns"):
        module.TokenLayout(wrong, np.zeros(4, np.int32))
    with pytest.raises(PromptError, match="segment_rel"):
        module.TokenLayout(columns_with(), wrong)
    with pytest.raises(PromptError, match="indices"):
        module.TokenLayout(columns_with(), np.zeros(4, np.int32)).take(wrong)


def test_a_distance_past_the_table_is_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    reach = SMALL.position_bias_max_distance
    known = _relation.signed_distance_buckets(SMALL)
    room = np.full(len(known) + 8, 99, np.int16)  # what lies around the table would be seen
    room[4:-4] = known
    monkeypatch.setattr(_relation, "signed_distance_buckets", lambda config: room[4:-4])
    columns = columns_with()
    for ahead in range(-reach - 3, reach + 4):
        columns[2] = (100, 100 + ahead, 100 + ahead + 1)
        layout = _relation.TokenLayout(columns, np.zeros(4, np.int32))
        out = np.empty((3, 3), np.int16)
        _relation.RelationBuilder(SMALL).fill(out, layout)
        distances = np.clip(columns[2][None] - columns[2][:, None], -reach, reach)
        np.testing.assert_array_equal(out, known[distances + reach])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("penalized", np.zeros(2, np.int64)), ("row", np.zeros(40)), ("row", np.zeros(80, np.float32)[::2]),
        ("row", np.zeros((4, 10), np.float32)), ("values", np.zeros(0, np.float32)), ("ids", np.zeros(4, np.int32)),
        ("vocab_size", -1), ("vocab_size", 41), ("ext_begin", 3), ("ext_end", 41), ("forbidden", 32), ("forbidden", -2),
        ("penalty", 0.0), ("penalty", -1.0), ("penalty", float("nan")), ("penalty", float("inf")),
    ],
)  # fmt: skip
def test_logits_that_do_not_fit_are_refused(name: str, value: Any) -> None:
    from cpmbee import _logits

    arguments = {
        "row": np.zeros(40, np.float32), "vocab_size": 32, "ext_begin": 34, "ext_end": 36,
        "penalized": np.array([-1, 5, 31, 32, 2**31 - 1, -(2**31), 5], np.int32), "penalty": 2.0, "forbidden": -1,
        "values": np.zeros(3, np.float32), "ids": np.zeros(3, np.int32),
    }  # fmt: skip
    for select in (_logits.select, plain_logits.select):
        select(*copy.deepcopy(list(arguments.values())))
        with pytest.raises(ValueError):
            select(*{**arguments, name: value}.values())


def test_a_number_that_is_another_whenever_it_is_asked() -> None:
    for _, tokenizer in (COMPILED, PLAIN):
        for _ in range(50):
            outcome(tokenizer.decode, [Number(3)], {Number(3): "a"})
            outcome(tokenizer.encode, "é", {Number(3): "é"})


def test_hostile_calls_do_not_end_the_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.hostile", "2500", "7"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert "returned" in done.stdout
