"""What the native ops refuse: one message that names op, input and value, and no read out of range."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.csrc.attention_model import (
    Arrays,
    Shape,
    attention_model,
    open_session,
    position_bias_model,
    random_inputs,
    requires_native,
)

pytestmark = requires_native
SHAPE = Shape()


def inputs_with(name: str, index: tuple[int, ...], value: int) -> Arrays:
    inputs = random_inputs(np.random.default_rng(0), SHAPE)
    inputs[name][index] = value
    return inputs


def refusal(model: bytes, inputs: Arrays) -> str:
    with pytest.raises(Exception, match="Bucketed") as caught:
        open_session(model, use_native=True).run(None, inputs)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "index", "value", "limits"),
    [
        ("relation", (1, 4, 11), SHAPE.buckets, "-1..23"),
        ("relation", (0, 0, 0), -2, "-1..23"),
        ("relation", (1, 0, 7), -32768, "-1..23"),
        ("slots", (1, 11), SHAPE.rows, "0..39"),
        ("slots", (0, 3), -1, "0..39"),
        ("slots", (0, 3), 2**31 - 1, "0..39"),
        ("new_slots", (1, 4), SHAPE.rows, "0..39"),
        ("new_slots", (0, 0), -(2**31), "0..39"),
    ],
)
def test_values_out_of_range(name: str, index: tuple[int, ...], value: int, limits: str) -> None:
    message = refusal(attention_model(SHAPE), inputs_with(name, index, value))
    position = ",".join(map(str, index))
    assert f"BucketedAttention: {name}[{position}] is {value}, must be in {limits}" in message


def test_a_bad_value_far_into_a_large_input_is_found() -> None:
    shape = Shape(batch=1, queries=300, keys=400, heads=1, dim_head=4, rows=500)
    inputs = random_inputs(np.random.default_rng(0), shape)
    inputs["relation"][0, 299, 399] = 1000
    assert "relation[0,299,399] is 1000" in refusal(attention_model(shape), inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": (2, 11)}, "slots must have the shape [B,K] = [2,12], not [2,11]"),
        ({"new_slots": (1, 5)}, "new_slots must have the shape [B,Q] = [2,5], not [1,5]"),
        ({"qkv": (2, 4, 144)}, "qkv must have the shape [B,Q,3*H*D] = [2,5,144], not [2,4,144]"),
        ({"value_cache": (39, 3, 16)}, "value_cache must have the shape [P,H,D] = [40,3,16], not [39,3,16]"),
        ({"relation": (2, 5, 13)}, "slots must have the shape [B,K] = [2,13], not [2,12]"),
    ],
)
def test_shapes_that_do_not_agree(changes: dict[str, tuple[int, ...]], message: str) -> None:
    inputs: dict[str, Any] = random_inputs(np.random.default_rng(0), SHAPE)
    for name, shape in changes.items():
        inputs[name] = np.zeros(shape, inputs[name].dtype)
    assert message in refusal(attention_model(SHAPE), inputs)


@pytest.mark.parametrize("empty", ["batch", "queries", "keys"])
def test_empty_inputs_give_empty_or_zero_outputs(empty: str) -> None:
    sizes = {"batch": 2, "queries": 3, "keys": 4} | {empty: 0}
    shape = Shape(**sizes)
    rng = np.random.default_rng(0)
    inputs = {
        "qkv": rng.standard_normal((shape.batch, shape.queries, 144), dtype=np.float32),
        "relation": np.zeros((shape.batch, shape.queries, shape.keys), np.int16),
        "table": np.zeros((24, 3), np.float32),
        "slots": np.zeros((shape.batch, shape.keys), np.int32),
        "new_slots": np.ones((shape.batch, shape.queries), np.int32),
        "key_cache": np.zeros((40, 3, 16), np.float32),
        "value_cache": np.zeros((40, 3, 16), np.float32),
    }
    context = open_session(attention_model(shape), use_native=True).run(["context"], inputs)[0]
    assert context.shape == (shape.batch, shape.queries, 48)
    assert not context.any()


def test_an_empty_table_admits_only_masked_keys() -> None:
    relation = np.full((1, 2, 3), -1, np.int16)
    inputs = {"relation": relation, "table": np.zeros((0, 2), np.float32)}
    session = open_session(position_bias_model(heads=2), use_native=True)
    assert np.isneginf(session.run(None, inputs)[0]).all()
    relation[0, 1, 2] = 0
    assert "relation[0,1,2] is 0, must be in -1..-1" in refusal(position_bias_model(heads=2), inputs)


@pytest.mark.parametrize("constant", [True, False])
def test_an_empty_table_with_more_heads_than_can_be_counted(constant: bool) -> None:
    table = np.zeros((0, (2**64 + 32) // 33), np.float32)  # 33 floats for each head: 2^64, which 64 bits do not hold
    model = position_bias_model(table.shape[1], table if constant else None)
    inputs = {"relation": np.zeros((1, 0, 1), np.int16)} | ({} if constant else {"table": table})
    assert "heads" in refusal(model, inputs)
