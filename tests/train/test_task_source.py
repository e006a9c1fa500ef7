"""Batches of records: epochs are epochs, whatever the rows of a batch, the batches of a step, the processes."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpmbee.errors import DataError
from cpmbee.model import IGNORE_INDEX
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.batches import TrainingBatch, encode_sample
from cpmbee.train.jsonl import open_records
from cpmbee.train.source import BatchSource
from cpmbee.train.task_samples import TaskSamples
from cpmbee.train.task_source import TaskSource
from cpmbee.train.tasks import TaskFields
from tests.model.factory import VOCABULARY
from tests.train.task_files import copy_records, write_records

TOKENIZER = Tokenizer(VOCABULARY)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("source") / "copy.jsonl", copy_records(40))


def source_of(file: Path, **options: Any) -> TaskSource:
    values: dict[str, Any] = {"row_length": 64, "batch_rows": 3, **options}
    return TaskSource(TaskSamples(open_records(file), TaskFields(), TOKENIZER), **values)


def take(source: TaskSource, count: int) -> list[TrainingBatch]:
    batches = iter(source)
    taken = list(islice(batches, count))
    batches.close()  # type: ignore[attr-defined]
    return taken


def same(one: TrainingBatch, other: TrainingBatch) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))


def records_in(batch: TrainingBatch) -> list[bytes]:
    found = []
    for ids, spans, length in zip(batch.input_ids, batch.spans, batch.length, strict=True):
        found += [ids[:length][spans[:length] == span].tobytes() for span in range(spans[:length].max(initial=-1) + 1)]
    return found


def encoded(file: Path) -> list[bytes]:
    return sorted(encode_sample(record, TOKENIZER).input_ids.tobytes() for record in open_records(file))


@pytest.mark.parametrize("batch_rows", [1, 3, 4, 50])
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_an_epoch_is_whole_steps_that_hold_every_record_once(data: Path, batch_rows: int, accumulation: int) -> None:
    source = source_of(data, batch_rows=batch_rows, accumulation=accumulation)
    assert isinstance(source, BatchSource)
    expected = encoded(data)
    orders = []
    for epoch in range(3):
        steps = source.steps(epoch + 1) - source.steps(epoch)
        batches = take(source, steps * accumulation)
        found = [record for batch in batches for record in records_in(batch)]
        assert sorted(found) == expected
        assert all(batch.input_ids.shape[1] <= 64 and len(batch.length) <= batch_rows for batch in batches)
        assert sum(int(batch.length.sum()) for batch in batches) == source.tokens
        assert source.epochs_done == epoch + 1
        orders.append(found)
    assert orders[0] != orders[1] != orders[2]


def test_only_the_last_batch_of_an_epoch_is_smaller(data: Path) -> None:
    source = source_of(data)
    rows = source.rows(0)
    assert rows % 3  # else this shows nothing
    sizes = [len(batch.length) for batch in take(source, source.steps(1))]
    assert sizes == [3] * (rows // 3) + [rows % 3]


def test_the_padding_that_is_told_is_what_batches_have(data: Path) -> None:
    source = source_of(data, row_length=45)
    batches = take(source, source.steps(1))
    positions = sum(batch.input_ids.size for batch in batches)
    assert source.padding() == pytest.approx(1 - source.tokens / positions)
    assert 0 < source.padding() < 0.15


def test_a_source_goes_on_where_it_was_over_the_end_of_an_epoch(data: Path) -> None:
    options = {"accumulation": 2}
    per_epoch = 2 * source_of(data, **options).steps(1)
    whole = take(source_of(data, **options), 2 * per_epoch + 3)
    for begin in range(1, len(whole)):
        first = source_of(data, **options)
        take(first, begin)
        second = source_of(data, **options)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert all(map(same, take(second, 3), whole[begin:]))


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_processes_share_the_batches_of_one(data: Path, world_size: int) -> None:
    """With fewer rows than processes, too: somebody gets a blank row then, and all have equally many batches."""
    alone = source_of(data)
    count = 2 * alone.steps(1) + 1
    whole = take(alone, count)
    shares = [take(source_of(data, rank=rank, world_size=world_size), count) for rank in range(world_size)]
    for parts, together in zip(zip(*shares, strict=True), whole, strict=True):
        assert all(len(part.length) for part in parts)
        ids = np.concatenate([part.input_ids for part in parts])
        assert np.array_equal(ids[: len(together.input_ids)], together.input_ids)
        for part in parts:
            blank = part.length == 0
            assert (part.targets[blank] == IGNORE_INDEX).all()
        assert sum(int(part.length.sum()) for part in parts) == together.length.sum()


def test_a_state_of_another_stream_is_refused(data: Path) -> None:
    state = source_of(data).state_dict()
    for options in ({"seed": 1}, {"row_length": 63}, {"batch_rows": 2}):
        with pytest.raises(ValueError, match="the saved data position has"):
            source_of(data, **options).load_state_dict(state)


def test_records_that_do_not_fit(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [*copy_records(3), {"input": "a" * 100, "<ans>": "a"}]
    source = source_of(write_records(tmp_path / "long.jsonl", records))
    assert source.over_long == 1
    assert "1 of 4 records are longer than a row of 64 tokens" in caplog.text
    with pytest.raises(DataError, match=r"all records are longer than a row of 5 tokens \(the shortest has"):
        source_of(data, row_length=5)
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: \$\.<ans>: holds no answer to learn"):
        source_of(write_records(tmp_path / "bad.jsonl", [{"a": "b", "<ans>": "c"}, {"a": "b", "<ans>": {}}]))
