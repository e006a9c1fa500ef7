"""Both dialects of config.json give the same model, and a configuration no model can have is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from cpmbee.config import ModelConfig
from cpmbee.errors import ConfigError

ORIGINAL: dict[str, Any] = {
    "vocab_size": 100,
    "dim_model": 48,
    "dim_ff": 112,
    "num_layers": 2,
    "num_heads": 4,
    "dim_head": 16,
    "mask_modules": [[False, True], [True, False]],
    "half": False,
}
HUGGING_FACE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 48,
    "dim_ff": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "dim_head": 16,
    "position_bias_num_segment_buckets": 256,
    "mask_modules": [[0, 1], [1, 0]],
    "model_type": "cpmbee",
}


def test_dialects_agree() -> None:
    assert ModelConfig.from_dict(ORIGINAL) == ModelConfig.from_dict(HUGGING_FACE)


@pytest.mark.parametrize("dialect", ["huggingface", "original"])
def test_round_trip(dialect: Any) -> None:
    config = ModelConfig.from_dict(ORIGINAL)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict(dialect)))) == config


def test_kept_blocks() -> None:
    config = ModelConfig.from_dict(ORIGINAL)
    assert config.attention_layers == (0,)
    assert config.ffn_layers == (1,)
    assert config.attention_dim == 64
    assert config.num_bias_rows == 512


@pytest.mark.parametrize(
    ("raw", "half"),
    [
        ({**ORIGINAL, "half": None}, True),
        ({**HUGGING_FACE}, False),
        ({**HUGGING_FACE, "torch_dtype": "float16"}, True),
        ({**HUGGING_FACE, "torch_dtype": "float16", "half": False}, False),
    ],
)
def test_half_follows_the_dialect(raw: dict[str, Any], half: bool) -> None:
    assert ModelConfig.from_dict(raw).half is half


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("dim_model", -48),
        ("dim_model", 47),
        ("num_layers", 5000),
        ("num_heads", "4"),
        ("num_heads", True),
        ("eps", 0),
        ("eps", float("nan")),
        ("eps", 10**400),
        ("half", "yes"),
        ("dropout_p", 1.0),
        ("position_bias_num_buckets", 3),
        ("position_bias_max_distance", 64),
        ("position_bias_num_segment_buckets", 40000),
        ("mask_modules", [[True, False]]),
        ("mask_modules", [[True, False], [True]]),
        ("mask_modules", "none"),
        ("distance_scale", 0),
    ],
)
def test_impossible_values_are_named(field: str, value: object) -> None:
    ours = {"dim_model": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}
    with pytest.raises(ConfigError, match=ours.get(field, field)):
        ModelConfig.from_dict({**ORIGINAL, field: value})


def test_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match="dim_ff"):
        ModelConfig.from_dict({name: value for name, value in ORIGINAL.items() if name != "dim_ff"})


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_bad_file_is_named(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_file(path)
