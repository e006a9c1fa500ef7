"""The engine's table of what exports write knows what they write now."""

from __future__ import annotations

import pytest

from cpmbee.cache_types import CACHE_TYPES
from cpmbee.export.exact_linear import exact_linear
from cpmbee.export.functions import bucketed_attention, bucketed_position_bias
from cpmbee.export.packing import BITS
from cpmbee.export.quantized_embedding import quantized_embedding
from cpmbee.export.quantized_functions import quantized_linear
from cpmbee.export.row_functions import add_rms_norm, gated_gelu, rms_norm, subscript_rotation
from cpmbee.folder import SCHEMA_VERSION
from cpmbee.graph_proto import read_function
from cpmbee.graph_rules import RULES, body_hash

BODIES = {
    ("BucketedPositionBias", ""): bucketed_position_bias(),
    **{("BucketedAttention", cache): bucketed_attention(cache) for cache in CACHE_TYPES},
    ("QuantizedLinear", ""): quantized_linear(),
    **{("ExactLinear", str(bits)): exact_linear(bits) for bits in BITS},
    **{("QuantizedEmbedding", str(bits)): quantized_embedding(bits) for bits in BITS},
    **{("SubscriptRotation", str(int(half))): subscript_rotation(half) for half in (False, True)},
    ("RMSNorm", ""): rms_norm(),
    ("AddRMSNorm", ""): add_rms_norm(),
    ("GatedGelu", ""): gated_gelu(),
}


@pytest.mark.parametrize(("name", "variant"), BODIES)
def test_bodies_are_known(name: str, variant: str) -> None:
    """If this fails, folders of this version cannot be opened: add the hash to the table, keep those that are there."""
    function = read_function(BODIES[name, variant].SerializeToString())
    assert body_hash(function) in RULES[SCHEMA_VERSION].bodies[name][variant]


def test_every_operator_of_ours_has_bodies() -> None:
    rules = RULES[SCHEMA_VERSION]
    assert {(name, variant) for name, variants in rules.bodies.items() for variant in variants} == BODIES.keys()
    assert {op for domain, op in rules.operators if domain == "cpm_bee"} <= rules.bodies.keys()
