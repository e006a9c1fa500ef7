"""The relation matrix against the research code's formulas, compiled against plain, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings

from cpmbee import _prompt, _relation, _tokenizer
from cpmbee.columns import NUM_COLUMNS, SAMPLE
from cpmbee.config import ModelConfig
from cpmbee.distance import distance_buckets
from cpmbee.errors import PromptError
from cpmbee.plain import relation as plain
from tests.engine.small_vocabulary import TOKENS
from tests.golden import GOLDEN, requires_golden

both = pytest.mark.parametrize("module", [_relation, plain], ids=["compiled", "plain"])
TOKENIZER = _tokenizer.Tokenizer(TOKENS)
REQUEST = {"a": {"今天": "天气b<mask_0>", "b": "abc"}, "<ans>": {"x": "", "y": ""}}
EXAMPLES = ({"a": "b", "<ans>": "天"}, {"a": {"a": "b"}, "<ans>": "天天"})


def config(**changes: int) -> ModelConfig:
    sizes = {"vocab_size": 99, "hidden_size": 8, "num_attention_heads": 2, "dim_head": 4, "dim_ff": 8}
    return ModelConfig(**{**sizes, "num_hidden_layers": 1, **changes})


SMALL = config(position_bias_num_buckets=16, position_bias_num_segment_buckets=70, position_bias_max_distance=12)


def by_formula(
    columns: npt.NDArray[Any], segment_rel: npt.NDArray[Any], settings: ModelConfig
) -> npt.NDArray[np.int64]:
    """Token by token, as the paper's model defines it; shares no code."""
    buckets, half = settings.position_bias_num_buckets, settings.position_bias_num_buckets // 2
    exact, reach = half // 2, settings.position_bias_max_distance
    tokens = [tuple(int(value) for value in column) for column in columns.T]
    out = np.full((len(tokens), len(tokens)), -1, np.int64)
    for i, (seg_q, sample_q, pos_q, context_q, span_q, segments, offset) in enumerate(tokens):
        for j, (seg_k, sample_k, pos_k, context_k, span_k, _, _) in enumerate(tokens):
            if span_q != span_k or sample_q not in (0, sample_k) or not (context_k or (not context_q and j <= i)):
                continue
            bucket = int(segment_rel[seg_q * segments + seg_k + offset]) if sample_q == sample_k else 1
            if bucket:
                out[i, j] = buckets + bucket - 1
                continue
            distance = abs(pos_k - pos_q)
            if distance >= exact:
                ratio = np.float32(math.log(np.float32(distance) / np.float32(exact)))
                scaled = ratio / np.float32(math.log(reach / exact)) * np.float32(half - exact)
                distance = min(half - 1, exact + int(scaled))
            out[i, j] = distance + (half if pos_k > pos_q else 0)
    return out


@st.composite
def layouts(draw: st.DrawFn) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Columns of up to 40 tokens in random runs of samples and spans, with random segment relations."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    offsets = np.cumsum([0, *(size * size for size in sizes)])
    buckets = st.sampled_from([0, 0, 1, 2, 9, 65, 70])
    segment_rel = draw(st.lists(buckets, min_size=int(offsets[-1]), max_size=int(offsets[-1])))
    columns: list[tuple[int, ...]] = []
    position = 0
    for _ in range(draw(st.integers(0, 10))):
        table = draw(st.integers(0, len(sizes) - 1))
        segment = draw(st.integers(0, sizes[table] - 1))
        context, span = draw(st.integers(0, 1)), draw(st.integers(0, 1))
        position = draw(st.sampled_from([position, position + 1, position - 3, position + 30]))
        for _ in range(draw(st.integers(1, 4))):
            columns.append((segment, table, position, context, span, sizes[table], int(offsets[table])))
            position += 1
    return np.array(columns, np.int32).reshape(-1, NUM_COLUMNS).T, np.array(segment_rel, np.int32)


def matrix(module: Any, layout: Any, settings: ModelConfig = SMALL, start: int = 0, extra: int = 0) -> Any:
    out = np.full((len(layout) - start, len(layout) + extra), 99, np.int16)
    module.RelationBuilder(settings).fill(out, layout, start)
    return out


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


def test_compiled_rows_are_contiguous() -> None:
    layout = _relation.TokenLayout.from_prompt(_prompt.encode_prompt(REQUEST, TOKENIZER))
    out = np.empty((len(layout), len(layout)), np.int16, order="F")
    with pytest.raises(ValueError, match="contiguous"):
        _relation.RelationBuilder(SMALL).fill(out, layout)


def columns_with(**changes: int) -> npt.NDArray[np.int32]:
    values = {"segment": 0, "sample": 0, "position": 0, "context": 1, "span": 0, "num_segments": 2, "rel_offset": 0}
    return np.array([[value] * 3 for value in {**values, **changes}.values()], np.int32)


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


@both
def test_far_positions_take_the_last_bucket(module: Any) -> None:
    columns = columns_with()
    columns[2] = (-(2**31) + 1, 0, 2**31 - 1)
    rows = matrix(module, module.TokenLayout(columns, np.zeros(4, np.int32)))
    np.testing.assert_array_equal(rows, [[0, 15, 15], [7, 0, 15], [7, 7, 0]])


@pytest.mark.parametrize(
    ("buckets", "reach"), [(256, 2048), (256, 4096), (32, 128), (16, 12), (8, 3), (64, 100), (24, 48), (4, 2)]
)
def test_distance_buckets_are_those_of_single_precision_torch(buckets: int, reach: int) -> None:
    torch = pytest.importorskip("torch")
    half, exact = buckets // 2, buckets // 4
    distance = torch.arange(2 * reach)
    large = torch.log(distance.float() / exact) / math.log(reach / exact) * (half - exact)
    expected = torch.where(distance < exact, distance, (exact + large.to(torch.int32)).clamp(max=half - 1)).numpy()
    ours = distance_buckets(buckets, reach)
    np.testing.assert_array_equal(ours, expected[: reach + 1])
    assert (expected[reach:] == ours[-1]).all()
