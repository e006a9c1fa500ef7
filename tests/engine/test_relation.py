"""The relation matrix against the research code's formulas, compiled against plain."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from cpmbee import _prompt, _relation
from cpmbee.plain import relation as plain
from tests.engine.relation_cases import (
    EXAMPLES,
    REQUEST,
    SMALL,
    TOKENIZER,
    both,
    by_formula,
    columns_with,
    config,
    layouts,
    matrix,
)
from tests.golden import GOLDEN, requires_golden


@settings(deadline=None, max_examples=150)
@given(layouts(), st.integers(0, 40), st.integers(0, 3))
def test_any_slice_of_queries_follows_the_formula(layout: Any, start: int, extra: int) -> None:
    columns, segment_rel = layout
    start = min(start, columns.shape[1])
    expected = by_formula(columns, segment_rel, SMALL)[start:]
    for module in (_relation, plain):
        rows = matrix(module, module.TokenLayout(columns, segment_rel), SMALL, start, extra)
        np.testing.assert_array_equal(rows[:, : columns.shape[1]], expected)
        assert (rows[:, columns.shape[1] :] == -1).all()


@settings(deadline=None, max_examples=100)
@given(layouts(), st.data())
def test_layouts_change_alike(layout: Any, data: st.DataObject) -> None:
    columns, segment_rel = layout
    ours, theirs = (module.TokenLayout(columns, segment_rel, 2) for module in (_relation, plain))
    for _ in range(data.draw(st.integers(0, 6))):
        match data.draw(st.sampled_from(["append", "truncate", "take", "copy"])):
            case "append" if len(ours):
                of = ours.columns[:, data.draw(st.integers(0, len(ours) - 1))].tolist()
                for each in (ours, theirs):
                    each.append(of[0], of[2] + 1, sample_id=of[1], span=of[4])
            case "truncate":
                length = data.draw(st.integers(0, len(ours)))
                ours.truncate(length)
                theirs.truncate(length)
            case "take" if len(ours):
                indices = data.draw(st.lists(st.integers(0, len(ours) - 1), max_size=12))
                ours, theirs = ours.take(indices), theirs.take(indices, reserve=3)
            case _:
                ours, theirs = ours.copy(), theirs.copy()
        np.testing.assert_array_equal(ours.columns, theirs.columns)
        assert ours.length == theirs.length == len(ours)
    np.testing.assert_array_equal(matrix(_relation, ours), matrix(plain, theirs))


@requires_golden
@both
def test_packed_rows_of_a_recorded_batch(module: Any) -> None:
    names = ["context", "sample_ids", "num_segments", "segment_ids", "segment_rel_offset", "spans"]
    names += ["segment_rel", "length"]
    with np.load(GOLDEN / "train" / "batch.npz") as batch:
        arrays = {name: batch[name] for name in names}
    settings = config()
    packed = module.RelationBuilder(settings).packed(**arrays)
    for row, length in enumerate(arrays["length"]):
        columns = np.stack(
            [
                arrays["segment_ids"][row],
                arrays["sample_ids"][row],
                np.arange(packed.shape[1]),
                arrays["context"][row],
                arrays["spans"][row],
                arrays["num_segments"][row],
                arrays["segment_rel_offset"][row],
            ]
        )[:, :length]
        expected = by_formula(columns, arrays["segment_rel"][row], settings)
        np.testing.assert_array_equal(packed[row, :length, :length], expected)
        assert (packed[row, length:] == -1).all()
        assert (packed[row, :, length:] == -1).all()


@both
def test_growing_token_by_token_equals_all_at_once(module: Any) -> None:
    prompt = _prompt.encode_prompt(REQUEST, TOKENIZER, EXAMPLES)
    layout = module.TokenLayout.from_prompt(prompt, reserve=2)
    rows = []
    for slot in prompt.answers:
        for _ in range(3):
            layout.append(slot.segment_id, len(layout))
            rows.append(matrix(module, layout, start=len(layout) - 1)[0])
    whole = matrix(module, layout)
    for row in rows:
        np.testing.assert_array_equal(row, whole[len(row) - 1, : len(row)])
        assert (whole[: len(prompt), len(prompt) :] == -1).all()


@both
def test_examples_first_moves_rows_and_columns_only(module: Any) -> None:
    prompt = _prompt.encode_prompt(REQUEST, TOKENIZER, EXAMPLES)
    layout = module.TokenLayout.from_prompt(prompt)
    order = np.argsort(prompt.sample_ids == 0, kind="stable")
    np.testing.assert_array_equal(matrix(module, layout.take(order)), matrix(module, layout)[np.ix_(order, order)])


@both
def test_who_sees_whom(module: Any) -> None:
    prompt = _prompt.encode_prompt(REQUEST, TOKENIZER, EXAMPLES)
    seen = matrix(module, module.TokenLayout.from_prompt(prompt)) >= 0
    sample = prompt.sample_ids
    np.testing.assert_array_equal(seen, (sample[:, None] == 0) | (sample[:, None] == sample[None, :]))


@both
def test_rows_may_lie_in_a_larger_array(module: Any) -> None:
    layout = module.TokenLayout.from_prompt(_prompt.encode_prompt(REQUEST, TOKENIZER))
    out = np.full((2, len(layout) + 2, len(layout) + 5), 99, np.int16)
    module.RelationBuilder(SMALL).fill(out[1, : len(layout), : len(layout) + 1], layout, 0)
    np.testing.assert_array_equal(out[1, : len(layout), : len(layout)], matrix(module, layout))
    assert (out[0] == 99).all()
    assert (out[1, len(layout) :] == 99).all()
    assert (out[1, :, len(layout) + 1 :] == 99).all()


@both
def test_far_positions_take_the_last_bucket(module: Any) -> None:
    columns = columns_with()
    columns[2] = (-(2**31) + 1, 0, 2**31 - 1)
    rows = matrix(module, module.TokenLayout(columns, np.zeros(4, np.int32)))
    np.testing.assert_array_equal(rows, [[0, 15, 15], [7, 0, 15], [7, 7, 0]])
