"""Arrays that do not fit each other are refused; nothing is ever read out of range."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cpmbee import _prompt
from cpmbee.columns import SAMPLE
from cpmbee.errors import PromptError
from tests.engine.relation_cases import REQUEST, SMALL, TOKENIZER, both, columns_with, matrix


@both
@pytest.mark.parametrize("case", ["type", "rows", "columns", "dimensions", "start", "readonly"])
def test_an_output_that_does_not_fit_is_refused(module: Any, case: str) -> None:
    layout = module.TokenLayout.from_prompt(_prompt.encode_prompt(REQUEST, TOKENIZER))
    n = len(layout)
    out = {
        "type": np.empty((n, n), np.int32),
        "rows": np.empty((n - 1, n), np.int16),
        "columns": np.empty((n, n - 1), np.int16),
        "dimensions": np.empty(n * n, np.int16),
        "start": np.empty((n + 1, n), np.int16),
        "readonly": np.empty((n, n), np.int16),
    }[case]
    out.flags.writeable = case != "readonly"
    with pytest.raises(ValueError, match=r"out|read-only"):
        module.RelationBuilder(SMALL).fill(out, layout, -1 if case == "start" else 0)


@both
def test_rows_are_contiguous_and_do_not_overlap(module: Any) -> None:
    layout = module.TokenLayout.from_prompt(_prompt.encode_prompt(REQUEST, TOKENIZER))
    n = len(layout)
    with pytest.raises(ValueError, match="contiguous"):
        module.RelationBuilder(SMALL).fill(np.empty((n, n), np.int16, order="F"), layout)
    overlapping = np.lib.stride_tricks.as_strided(np.empty(3 * n, np.int16), (n, n), (4, 2))
    with pytest.raises(ValueError, match="overlap"):
        module.RelationBuilder(SMALL).fill(overlapping, layout)


@both
@pytest.mark.parametrize(
    "changes",
    [
        {"segment": 2},
        {"segment": -1},
        {"num_segments": 0},
        {"num_segments": 3},
        {"num_segments": 2**31 - 1},
        {"num_segments": -2},
        {"rel_offset": 1},
        {"rel_offset": -1},
        {"rel_offset": 2**31 - 1},
    ],
)
def test_columns_never_point_outside(module: Any, changes: dict[str, int]) -> None:
    with pytest.raises(PromptError, match="token 0 points outside"):
        module.TokenLayout(columns_with(**changes), np.zeros(4, np.int32))
    batch = dict(
        zip(("segment_ids", "sample_ids", "position", "context", "spans"), columns_with(**changes), strict=False)
    )
    batch |= dict(zip(("num_segments", "segment_rel_offset"), columns_with(**changes)[5:], strict=True))
    del batch["position"]
    rows = {name: row[None] for name, row in batch.items()}
    with pytest.raises(PromptError, match="token 0 points outside"):
        module.RelationBuilder(SMALL).packed(
            **rows, segment_rel=np.zeros((1, 4), np.int32), length=np.array([3], np.int32)
        )


@both
def test_tokens_of_one_sample_with_two_tables_never_read_outside(module: Any) -> None:
    columns = columns_with(segment=1)
    columns[:, 1] = (0, 0, 1, 1, 0, 1, 0)
    columns[:, 2] = (7, 0, 2, 1, 0, 8, 0)
    layout = module.TokenLayout(columns, np.zeros(64, np.int32))
    layout_with_short_table = module.TokenLayout(columns[:, :2], np.zeros(4, np.int32))
    assert matrix(module, layout_with_short_table).shape == (2, 2)
    assert matrix(module, layout).shape == (3, 3)
    columns[:, 1] = (0, 0, 1, 1, 0, 1, 63)
    with pytest.raises(PromptError, match="outside the table"):
        matrix(module, module.TokenLayout(columns, np.zeros(64, np.int32)))


@both
@pytest.mark.parametrize("bucket", [-1, 71, 2**31 - 1, -(2**31)])
def test_a_bucket_without_a_row_in_the_table_is_refused(module: Any, bucket: int) -> None:
    layout = module.TokenLayout(columns_with(), np.full(4, bucket, np.int32))
    with pytest.raises(PromptError, match=r"1\.\.70"):
        matrix(module, layout)


@both
def test_a_batch_that_does_not_fit_together_is_refused(module: Any) -> None:
    column, rel = np.zeros((1, 3), np.int32), np.zeros((1, 4), np.int32)
    batch = dict.fromkeys(("sample_ids", "segment_ids", "segment_rel_offset", "spans"), column)
    batch |= {"context": column, "num_segments": column + 2, "segment_rel": rel, "length": np.array([3])}
    builder = module.RelationBuilder(SMALL)
    assert builder.packed(**batch).shape == (1, 3, 3)
    for name, value, message in [
        ("spans", np.zeros((1, 4), np.int32), "same shape"),
        ("segment_rel", np.zeros((2, 4), np.int32), "same shape"),
        ("length", np.array([4]), r"row 0 .*length 4"),
        ("length", np.array([-1]), r"row 0 .*length -1"),
    ]:
        with pytest.raises(PromptError, match=message):
            builder.packed(**{**batch, name: value})


@both
def test_appending_to_what_is_not_there_is_refused(module: Any) -> None:
    layout = module.TokenLayout.from_prompt(_prompt.encode_prompt(REQUEST, TOKENIZER))
    with pytest.raises(PromptError, match="sample 1"):
        layout.append(0, 5, sample_id=1)
    with pytest.raises(PromptError, match="span 2"):
        layout.append(0, 5, span=2)
    with pytest.raises(PromptError, match="segment 99"):
        layout.append(99, 5)
    with pytest.raises(PromptError, match="32 bits"):
        layout.append(0, 2**31)
    with pytest.raises(PromptError, match="truncate"):
        layout.truncate(len(layout) + 1)
    with pytest.raises(PromptError, match="indices"):
        layout.take([len(layout)])
    with pytest.raises(PromptError, match="shape"):
        module.TokenLayout(np.zeros((3, 2), np.int32), np.zeros(4, np.int32))
    with pytest.raises(ValueError, match="read-only"):
        layout.columns[SAMPLE, 0] = 5
