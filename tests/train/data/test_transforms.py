"""Transforms: mappings, the ready ones, and what is said of those that cannot be understood."""

import re
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given

from cpmbee.errors import DataError
from cpmbee.train.data.formats import SYNONYMS, PerturbFormat
from cpmbee.train.data.mapping import FieldMapping
from cpmbee.train.data.markup import unclosed_token, units
from cpmbee.train.data.text_transforms import ContinueText, MaskSpans
from cpmbee.train.data.transform import Transform
from cpmbee.train.data.transform_config import parse_transforms
from tests.engine.small_vocabulary import tame_text

RECORD = {"text": "今天", "options": {"<option_0>": "a", "<option_1>": "b"}, "answer": {"label": "<option_1>"}}
seeds = st.integers(0, 2**32)


def apply(transform: Transform, record: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return transform.plan(rng)(record, 0, rng)


def parsed(raw: Any, record: dict[str, Any] = RECORD, seed: int = 0, **scripts: str) -> dict[str, Any]:
    return apply(parse_transforms(raw, {f"{name}.py": source for name, source in scripts.items()}), record, seed)


@pytest.mark.parametrize(
    ("mapping", "sample"),
    [
        ({"input": "$text", "<ans>": "x"}, {"input": "今天", "<ans>": "x"}),
        ({"<ans>.<option>": "$answer.label"}, {"<ans>": {"<option>": "<option_1>"}}),
        ({"a.b": "1", "a": {"c.d": "2"}, "<ans>": "$$1"}, {"a": {"b": "1", "c": {"d": "2"}}, "<ans>": "$1"}),
        ({"a\\.b": "$text", "<ans>": ""}, {"a.b": "今天", "<ans>": ""}),
        ({"*": "$*"}, RECORD),
        ({"<ans>.*": "$options.*"}, {"<ans>": {"<option_0>": "a", "<option_1>": "b"}}),
        ({"choices": "$options", "choices.new": "c", "<ans>": ""}, None),
        ({"x.*": "$*.label", "<ans>": ""}, {"x": {"answer": "<option_1>"}, "<ans>": ""}),
        ({"*.*": "$*.*", "<ans>": ""}, {"options": RECORD["options"], "answer": RECORD["answer"], "<ans>": ""}),
    ],
)
def test_mappings(mapping: dict[str, Any], sample: dict[str, Any] | None) -> None:
    before = repr(RECORD)
    found = FieldMapping(mapping)(RECORD)
    assert repr(RECORD) == before
    assert found == (sample or {"choices": {"<option_0>": "a", "<option_1>": "b", "new": "c"}, "<ans>": ""})


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"input": "$text"}, 'no target "<ans>"'),
        ({"<ans>": 3}, "<ans>: expected text"),
        ({"a": {"b": ["x"]}, "<ans>": ""}, r"a\.b: expected text"),
        ({"a.*": "x", "<ans>": ""}, r"a\.\*: a \* in the target"),
        ({"a.*": "$text", "<ans>": ""}, "equally many"),
        ({"a": "$*", "<ans>": ""}, "equally many"),
        ({"a..b": "x", "<ans>": ""}, "'a..b': a name in the path is empty"),
    ],
)
def test_mappings_that_cannot_be_understood(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"item 1: .*{message}"):
        parse_transforms([{"<ans>": "ok"}, mapping], {})


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"<ans>": "$absent"}, "the record has no field 'absent'; its fields are 'text', 'options', 'answer'"),
        ({"<ans>": "$text.label"}, "no field 'text.label'"),
        ({"a": "$text", "a.b": "$text", "<ans>": ""}, r"a\.b: a is text already"),
    ],
)
def test_mappings_that_a_record_does_not_fit(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parsed([mapping])


@given(tame_text, seeds, st.floats(0.01, 0.9), st.integers(1, 9))
def test_masked_spans_can_be_put_back(text: str, seed: int, share: float, length: int) -> None:
    assume(text)
    text += "<mask_1>"
    record = {"text": text, "prompt": "p"}
    sample = apply(MaskSpans(share=share, length=length), record, seed)
    answers = sample["<ans>"]
    assert sample["prompt"] == "p"
    assert 1 <= len(answers) <= 16
    assert all(answers.values())
    assert unclosed_token(sample["document"]) is None
    assert [part for part in units(sample["document"]) if part in answers] == list(answers)
    assert "".join(answers.get(part, part) for part in units(sample["document"])) == text


def test_about_the_share_is_masked() -> None:
    text = "天" * 1000
    counts = []
    for seed in range(50):
        sample = apply(MaskSpans(share=0.15, length=4, max_spans=100), {"text": text}, seed)
        counts.append(sum(map(len, sample["<ans>"].values())))
    assert 0.13 < np.mean(counts) / 1000 < 0.17


@given(tame_text, seeds)
def test_continuing_cuts_between_units(text: str, seed: int) -> None:
    assume(len(units(text)) >= 2)
    sample = apply(ContinueText(), {"text": text, "<ans>": "old", "b": "c"}, seed)
    assert list(sample) == ["input", "b", "<ans>"]
    assert sample["input"] + sample["<ans>"] == text
    assert sample["input"]
    assert sample["<ans>"]
    assert unclosed_token(sample["input"]) is None


@given(st.dictionaries(st.sampled_from([name for group in SYNONYMS for name in group] + ["a", "b"]), st.text()), seeds)
def test_formats_keep_the_content(fields: dict[str, str], seed: int) -> None:
    record: dict[str, Any] = {**fields, "<ans>": {"x": "y"}}
    sample = apply(PerturbFormat(1, 1, 0), record, seed)
    assert sample["<ans>"] == {"x": "y"}
    assert sorted(sample.values(), key=str) == sorted(record.values(), key=str)
    groups = {name: group for group in SYNONYMS for name in group}
    assert sorted(str(groups.get(name, name)) for name in sample) == sorted(
        str(groups.get(name, name)) for name in record
    )
    joined = apply(PerturbFormat(0, 0, 1), record, seed)
    assert joined["<ans>"] == {"x": "y"}
    assert len(joined) == len(record) - (len(fields) >= 2)
    assert all(any(value in text for text in joined.values() if isinstance(text, str)) for value in fields.values())


def test_formats_differ_between_samples_and_agree_within_one() -> None:
    record = {"input": "今天", "prompt": "p", "<ans>": "a"}
    transform = PerturbFormat()
    seen = set()
    for seed in range(200):
        rng = np.random.default_rng(seed)
        plan = transform.plan(rng)
        first, second = (str(plan(record, 1, rng)) for _ in range(2))
        assert first == second
        seen.add(first)
    assert len(seen) > 50


def test_one_item_is_drawn_and_a_list_is_applied_in_turn() -> None:
    raw = [{"<ans>": "1"}, [{"name": "continue_text"}, {"new": "$input", "<ans>": "$<ans>"}]]
    found = [parsed(raw, {"text": "ab"}, seed) for seed in range(20)]
    assert {"<ans>": "1"} in found
    assert {"new": "a", "<ans>": "b"} in found


def test_a_mapping_may_have_a_field_called_name() -> None:
    assert parsed([{"name": "mask_spans", "<ans>": "x"}]) == {"name": "mask_spans", "<ans>": "x"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "not empty"),
        (3, "expected a list"),
        ([3], "item 0: expected a mapping or a ready transform, not int"),
        ([{"name": "absent"}], "no ready transform is called 'absent'; there are mask_spans"),
        ([{"name": "mask_spans", "what": 1}], "mask_spans has no option 'what'; it has field, into, share"),
        ([{"name": "mask_spans", "share": "x"}], "mask_spans: share must be of type float, not 'x'"),
        ([{"name": "mask_spans", "length": True}], "length must be of type int, not True"),
        ([{"name": "mask_spans", "share": 1}], "share: must lie between"),
        ([{"name": "mask_spans", "length": 0}], "must be at least 1"),
        ([{"name": "continue_text", "min_share": 0.6}], "min_share: must lie between"),
        ([{"name": "perturb_format", "join": 2}], "join: must lie between"),
    ],
)
def test_transforms_that_cannot_be_understood(raw: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_transforms(raw, {})


@pytest.mark.parametrize("name", ["mask_spans", "continue_text"])
@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"a": "b"}, "has no field 'text'; its fields are 'a'"),
        ({"text": {}}, "has no text"),
        ({"text": ""}, "empty|few"),
    ],
)
def test_texts_that_are_not_there(name: str, record: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parsed([{"name": name}], record)


def test_python_files() -> None:
    source = "def transform(data, num_samples, rng):\n    return {'<ans>': data['text'] + str(rng.integers(1))}\n"
    assert parsed("a.py", a=source) == {"<ans>": "今天0"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def transform(:", "a.py: cannot be run (SyntaxError"),
        ("raise ValueError('no')", "a.py: cannot be run (ValueError: no)"),
        ("x = 1", "a.py: has no function transform(data, num_samples, rng)"),
        ("def transform(data): pass", "a.py: transform must take (data, num_samples, rng)"),
    ],
)
def test_python_files_that_cannot_be_used(source: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        parsed("a.py", a=source)
