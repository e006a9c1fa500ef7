"""The least work of attention, counted by hand, whatever its cache is made of."""

import pytest
from onnx import TensorProto, helper

from cpmbee.bench.graph_cost import costs
from cpmbee.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=10, hidden_size=8, num_attention_heads=2, dim_head=4, dim_ff=16, num_hidden_layers=1, eps=1e-6
)
TYPES = {"fp32": (TensorProto.FLOAT, 4), "fp16": (TensorProto.FLOAT16, 2), "int8": (TensorProto.INT8, 1)}


@pytest.mark.parametrize("cache", TYPES)
def test_attention_reads_the_cache_as_it_is_stored(cache: str) -> None:
    element, size = TYPES[cache]
    caches = {"key_cache.0": (element, [None, 2, 4]), "value_cache.0": (element, [None, 2, 4])}
    if cache == "int8":
        caches |= {name: (TensorProto.FLOAT, [None, 2]) for name in ("key_scales.0", "value_scales.0")}
    names = list(caches)
    node = helper.make_node("BucketedAttention", ["qkv", *names], ["context", *(f"present_{name}" for name in names)])
    inputs = [helper.make_tensor_value_info(name, *about) for name, about in caches.items()]
    qkv = helper.make_tensor_value_info("qkv", TensorProto.FLOAT, [None, None, 24])
    model = helper.make_model(helper.make_graph([node], "attention", [qkv, *inputs], []))
    (cost,) = costs(model, CONFIG, tokens=3, keys=5, sequences=7, cache_rows=19).values()  # some keys are shared
    row = 2 * (2 * 4 * size + (2 * 4 if cache == "int8" else 0))
    assert cost.bytes == row * 19
    assert cost.operations == 2 * 2 * (2 * 4) * 3 * 5 * 7  # a product with keys, one with values; 2 heads of 4
