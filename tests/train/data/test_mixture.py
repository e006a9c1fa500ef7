"""Mixtures: drawn by weight, as tasks, with examples; errors name file, data set and field or record."""

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpmbee.errors import DataError
from cpmbee.model import IGNORE_INDEX
from tests.train.data.cases import make_source, numbered, take, texts, tokenizer, write_dataset, write_mixture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two data sets that begin with different letters, and one without records."""
    write_dataset(tmp_path / "first", numbered("x", 50))
    write_dataset(tmp_path / "second", numbered("y", 20))
    write_dataset(tmp_path / "empty", [])
    return tmp_path


def starts(batches: list[Any]) -> Counter[str]:
    return Counter("x" if "<s>x" in text else "y" for batch in batches for text in texts(batch))


def test_data_sets_are_drawn_by_weight(folder: Path) -> None:
    mixture = write_mixture(folder / "mix.json", [{"dataset": "first", "weight": 3}, {"dataset": "second"}])
    source = make_source(mixture)
    counts = starts(take(source, 120))
    assert 0.7 < counts["x"] / counts.total() < 0.8
    assert source.tasks == ("first", "second")


def test_every_record_comes_once_each_time_round(folder: Path) -> None:
    source = make_source(write_mixture(folder / "mix.json", [{"dataset": "second"}]), row_length=4000, batch_rows=1)
    seen = [text for batch in take(source, 2) for text in texts(batch)]
    counts = Counter(seen)
    assert len(counts) == 20
    assert max(counts.values()) - min(counts.values()) <= 2  # the best fit takes some records of a round earlier


def test_tokens_carry_the_task_of_their_sample(folder: Path) -> None:
    entries = [{"dataset": "first", "task": "a"}, {"dataset": "second", "task": "b"}, {"dataset": "first", "task": "a"}]
    source = make_source(write_mixture(folder / "mix.json", entries))
    words = tokenizer()
    for batch in take(source, 5):
        for row in range(2):
            used = int(batch.length[row])
            assert (batch.task_ids[row, used:] == -1).all()
            for span in range(int(batch.spans[row, :used].max()) + 1):
                inside = np.flatnonzero(batch.spans[row, :used] == span)
                text = words.decode(batch.input_ids[row, inside].tolist())
                assert set(batch.task_ids[row, inside]) == {0 if "<s>x" in text else 1}
    assert source.tasks == ("a", "b")


def test_rows_are_full_and_padding_is_counted(folder: Path) -> None:
    source = make_source(write_mixture(folder / "mix.json", [{"dataset": "first"}]), row_length=200)
    batches = take(source, 10)
    padding = 1 - sum(int(batch.length.sum()) for batch in batches) / (10 * 2 * 200)
    assert padding < 0.01
    source.close()
    statistics = source.statistics
    assert statistics.batches >= 10
    assert statistics.padding_share < 0.01
    assert statistics.samples > 100
    assert statistics.tokens_per_second > 0


def test_examples_are_drawn_by_weight_and_never_the_request_itself(folder: Path) -> None:
    entry = {"dataset": "second", "incontext_weight": [1, 0, 1]}
    source = make_source(write_mixture(folder / "mix.json", [entry]), row_length=256)
    counts: Counter[int] = Counter()
    for batch in take(source, 40):
        for row in range(2):
            for span in range(int(batch.spans[row].max()) + 1):
                inside = (batch.spans[row] == span) & (batch.task_ids[row] == 0)
                samples = batch.sample_ids[row][inside]
                parts = [tuple(batch.input_ids[row][inside][samples == i]) for i in range(samples.max() + 1)]
                assert len(set(parts)) == len(parts)
                counts[len(parts) - 1] += 1
                assert batch.context[row][inside][samples > 0].all()
                assert (batch.targets[row][inside][samples > 0] == IGNORE_INDEX).all()
    assert set(counts) == {0, 2}
    assert 0.4 < counts[2] / counts.total() < 0.6


def test_a_data_set_of_one_record_has_no_examples_to_give(folder: Path) -> None:
    write_dataset(folder / "one", [{"input": "z", "<ans>": "z"}])
    source = make_source(write_mixture(folder / "mix.json", [{"dataset": "one", "incontext_weight": [0, 1]}]))
    assert next(source).sample_ids.max() == 0


def test_answers_are_shuffled(folder: Path) -> None:
    write_dataset(folder / "many", [{"<ans>": {letter: letter for letter in "abcd"}}])
    source = make_source(write_mixture(folder / "mix.json", [{"dataset": "many"}]))
    assert len({text for batch in take(source, 8) for text in texts(batch)}) > 10


def test_over_long_samples_are_counted_and_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_dataset(folder / "long", [*numbered("x", 3), {"input": "z" * 100, "<ans>": "z"}])
    source = make_source(write_mixture(folder / "mix.json", [{"dataset": "long"}]))
    with caplog.at_level(logging.WARNING, "cpmbee"):
        batches = take(source, 5)
    assert all("zzz" not in text for batch in batches for text in texts(batch))
    source.close()
    assert source.statistics.over_long["long"] > 5
    assert "task long: 1 samples so far are longer than a row of 64 tokens" in caplog.text
    assert len(caplog.records) < 15


def test_texts_too_short_for_their_transform_are_counted_and_said(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line of one character must not end a run that found it after a day."""
    write_dataset(folder / "short", [{"text": "abcd"}, {"text": "x"}, {"text": "efgh"}])
    write_dataset(folder / "blank", [{"text": ""}])
    entry = {"dataset": "short", "transforms": [{"name": "continue_text"}], "incontext_weight": [1, 1]}
    source = make_source(write_mixture(folder / "mix.json", [entry]))
    with caplog.at_level(logging.WARNING, "cpmbee"):
        batches = take(source, 5)
    assert not any("x" in text for batch in batches for text in texts(batch))
    source.close()
    assert source.statistics.too_short["short"] > 5
    assert "task short: 1 samples so far are too short for their transform and are left out" in caplog.text
    assert not source.statistics.over_long
    source = make_source(
        write_mixture(folder / "mix.json", [{"dataset": "blank", "transforms": [{"name": "mask_spans"}]}])
    )
    with pytest.raises(DataError, match=r"1000 samples in a row are too short for their transform; .*blank"):
        next(source)


def test_examples_that_do_not_fit_are_left_out(folder: Path) -> None:
    entry = {"dataset": "first", "incontext_weight": [0, 0, 0, 0, 1]}
    source = make_source(write_mixture(folder / "mix.json", [entry]), row_length=40)
    take(source, 3)
    source.close()
    assert source.statistics.shortened["first"] > 0
    assert not source.statistics.over_long


def test_a_mixture_of_over_long_samples_only_is_given_up(folder: Path) -> None:
    source = make_source(write_mixture(folder / "mix.json", [{"dataset": "first"}]), row_length=8)
    with pytest.raises(DataError, match=r"mix\.json: 1000 samples in a row are longer than a row of 8 tokens"):
        next(source)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("{", r"mix\.json: not JSON"),
        ("[]", r"mix\.json: expected a list of data sets that is not empty"),
        ("{}", r"mix\.json: expected a list"),
        ([3], r"mix\.json, data set 0: expected an object, not int"),
        ([{"weight": 1}], r"mix\.json, data set 0: dataset: expected the path"),
        ([{"dataset": "first", "wieght": 1}], r"mix\.json, data set 0 \(first\): wieght: no such field"),
        ([{"dataset": "first", "weight": -1}], r"\(first\): weight: expected a number from 0 on, not -1"),
        ([{"dataset": "first", "weight": 10**400}], r"\(first\): weight: expected a number from 0 on, not 1000"),
        ([{"dataset": "first", "weight": 0}], r"mix\.json: every weight is 0"),
        ([{"dataset": "first", "task": 3}], r"\(first\): task: expected a name"),
        ([{"dataset": "first", "incontext_weight": []}], r"\(first\): incontext_weight: expected a list"),
        ([{"dataset": "first", "incontext_weight": [0]}], r"\(first\): incontext_weight: every weight is 0"),
        ([{"dataset": "first", "incontext_weight": [1, "x"]}], r"\(first\): incontext_weight\[1\]: expected"),
        ([{"dataset": "first"}, {"dataset": "absent"}], r"data set 1 \(absent\): .*absent: does not exist"),
        ([{"dataset": "empty"}], r"data set 0 \(empty\): dataset: the data set is empty"),
        ([{"dataset": "first", "transforms": [{"input": "x"}]}], r"\(first\): transforms: item 0: .*no target"),
        ([{"dataset": "first", "transforms": "absent.py"}], r"absent\.py: cannot read"),
    ],
)
def test_mixtures_that_cannot_be_used(folder: Path, entries: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_source(write_mixture(folder / "mix.json", entries))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('no')", r"its transform raised KeyError: 'no'"),
        ("return {'input': 'a'}", "the sample has no \"<ans>\", so nothing to learn; it has 'input'"),
        ("return {'<ans>': {}}", "holds no answer to write"),
        ("return None", "expected a dict, not NoneType"),
        ("return {'<ans>': 3}", r"\$\.<ans>: expected a string or a dict, not int"),
        ("return {'a': 'x <', '<ans>': ''}", r"\$\.a: the `<` at character 2"),
    ],
)
def test_transforms_at_fault_are_named_with_the_record(folder: Path, body: str, message: str) -> None:
    (folder / "bad.py").write_text(f"def transform(data, num_samples, rng):\n    {body}\n")
    source = make_source(write_mixture(folder / "mix.json", [{"dataset": "first", "transforms": "bad.py"}]))
    for _ in range(2):  # and again, for those who catch it
        with pytest.raises(DataError, match=rf"mix\.json, data set .*first, record \d+: .*{message}"):
            next(source)


def test_records_must_have_answers_where_nothing_transforms_them(folder: Path) -> None:
    write_dataset(folder / "bare", [{"text": "a"}])
    source = make_source(write_mixture(folder / "mix.json", [{"dataset": "bare"}]))
    with pytest.raises(DataError, match='bare, record 0: the sample has no "<ans>"'):
        next(source)


def test_a_damaged_shard_is_named(folder: Path) -> None:
    file = folder / "first" / "shard-00000.arrow"
    content = bytearray(file.read_bytes())
    content[content.index(b'"input"')] ^= 1
    file.write_bytes(content)
    source = make_source(write_mixture(folder / "mix.json", [{"dataset": "first"}]))
    with pytest.raises(DataError, match=r"shard-00000\.arrow: the shard is damaged"):
        next(source)
