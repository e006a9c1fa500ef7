"""Layouts and an independent formula for the tests of the relation matrix."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import numpy.typing as npt
import pytest

from cpmbee import _relation, _tokenizer
from cpmbee.columns import NUM_COLUMNS
from cpmbee.config import ModelConfig
from cpmbee.plain import relation as plain
from tests.engine.small_vocabulary import TOKENS

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


def columns_with(**changes: int) -> npt.NDArray[np.int32]:
    values = {"segment": 0, "sample": 0, "position": 0, "context": 1, "span": 0, "num_segments": 2, "rel_offset": 0}
    return np.array([[value] * 3 for value in {**values, **changes}.values()], np.int32)
