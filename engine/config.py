"""The model's configuration, in either of the two dialects that published checkpoints use."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from cpmbee.errors import ConfigError
from cpmbee.json_file import read_json_object
from cpmbee.option_values import shown

RESIDUAL_SCALE = 1.05  # what every block divides the residual stream by
PHASE_BASE = 10000.0  # of the frequencies that rotate embeddings by their subscript

# The research code's name of a field -> ours, which is Hugging Face's.
ORIGINAL_NAMES = {
    "dim_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
}
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "dim_head",
    "dim_ff",
    "num_hidden_layers",
    "position_bias_num_buckets",
    "position_bias_num_segment_buckets",
    "position_bias_max_distance",
)
_LIMIT = 1 << 24  # no field of a real model comes near it; keeps products inside int64
_LAYER_LIMIT = 1 << 12


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of one CPM-Bee model.

    Attributes:
        vocab_size: rows of the embedding, which is also the output head.
        hidden_size: width of the residual stream.
        num_attention_heads: heads of each attention block; heads * dim_head may differ from hidden_size.
        dim_head: width of one head.
        dim_ff: width of the gated feed-forward block.
        num_hidden_layers: layers, counting those whose blocks are pruned.
        position_bias_num_buckets: distance buckets inside a segment; the upper half is for later keys.
        position_bias_num_segment_buckets: buckets for the relation between two segments.
        position_bias_max_distance: distance from which the last bucket applies.
        eps: of every RMS norm.
        half: the checkpoint was trained in fp16, so phases of the extension embedding are rounded to fp16.
        distance_scale: factor from subscript to phase in the extension embedding.
        dropout_p: used only in training.
        mask_modules: per layer (attention pruned, feed-forward pruned), or None when nothing is pruned.
    """

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    dim_head: int
    dim_ff: int
    num_hidden_layers: int
    position_bias_num_buckets: int = 256
    position_bias_num_segment_buckets: int = 256
    position_bias_max_distance: int = 2048
    eps: float = 1e-6
    half: bool = False
    distance_scale: float = 16.0
    dropout_p: float = 0.0
    mask_modules: tuple[tuple[bool, bool], ...] | None = None

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value, limit = getattr(self, name), _LAYER_LIMIT if name == "num_hidden_layers" else _LIMIT
            if type(value) is not int or not 0 < value <= limit:
                raise ConfigError(f"config: {name} must be an integer from 1 to {limit}, not {shown(value)}")
        for name in ("eps", "distance_scale"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:  # an int may be larger
                raise ConfigError(f"config: {name} must be a positive number, not {shown(value)}")
        if type(self.dropout_p) not in (int, float) or not 0 <= self.dropout_p < 1:
            raise ConfigError(f"config: dropout_p must be in [0, 1), not {shown(self.dropout_p)}")
        if type(self.half) is not bool:
            raise ConfigError(f"config: half must be true or false, not {shown(self.half)}")
        exact = self.position_bias_num_buckets // 4  # distances with a bucket of their own; log(1 / exact) must exist
        if exact < 1 or self.position_bias_max_distance <= exact:
            raise ConfigError(
                "config: position_bias_num_buckets must be at least 4, and position_bias_max_distance more "
                f"than a quarter of it, not {self.position_bias_num_buckets} and {self.position_bias_max_distance}"
            )
        if self.position_bias_num_buckets + self.position_bias_num_segment_buckets > 32767:
            raise ConfigError(
                f"config: position_bias_num_segment_buckets {self.position_bias_num_segment_buckets} "
                "makes the bias table longer than an int16 can name (32767 rows)"
            )
        if self.hidden_size % 2:
            raise ConfigError(f"config: hidden_size must be even, not {self.hidden_size}")
        if self.mask_modules is not None and len(self.mask_modules) != self.num_hidden_layers:
            raise ConfigError(
                f"config: mask_modules has {len(self.mask_modules)} entries for {self.num_hidden_layers} layers"
            )

    @property
    def num_bias_rows(self) -> int:
        """Rows of the position bias table: distance buckets, then segment buckets."""
        return self.position_bias_num_buckets + self.position_bias_num_segment_buckets

    @property
    def attention_dim(self) -> int:
        """Width of all heads together."""
        return self.num_attention_heads * self.dim_head

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose attention block is kept."""
        return self._kept(0)

    @property
    def ffn_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose feed-forward block is kept."""
        return self._kept(1)

    def _kept(self, block: int) -> tuple[int, ...]:
        layers = range(self.num_hidden_layers)
        return tuple(i for i in layers if self.mask_modules is None or not self.mask_modules[i][block])

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read either dialect; keys that say nothing about the model (``torch_dtype`` aside) are ignored.

        Raises:
            ConfigError: a field is missing or has a value that no model can have.
        """
        original = any(name in raw for name in ORIGINAL_NAMES)
        known = {field.name for field in fields(cls)}
        values = {ORIGINAL_NAMES.get(name, name): value for name, value in raw.items()}
        values = {name: value for name, value in values.items() if name in known and value is not None}
        if "half" not in values:  # each dialect's own default
            values["half"] = original or raw.get("torch_dtype", raw.get("dtype")) in (
                "float16",
                "torch.float16",
            )
        if "position_bias_num_segment_buckets" not in values and not original:
            values["position_bias_num_segment_buckets"] = 32
        if "mask_modules" in values:
            values["mask_modules"] = _mask_modules(values["mask_modules"])
        required = [field.name for field in fields(cls) if field.name in _POSITIVE[:6]]
        if missing := [name for name in required if name not in values]:
            raise ConfigError(f"config: {', '.join(missing)} missing; is this the config.json of a CPM-Bee model?")
        return cls(**values)

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Read ``config.json``.

        Raises:
            ConfigError: the file is absent, not JSON, or not a model's configuration; names the file.
        """
        raw = read_json_object(Path(path), "the model configuration", ConfigError)
        try:
            return cls.from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self, dialect: Literal["huggingface", "original"] = "huggingface") -> dict[str, Any]:
        """The configuration as JSON-ready values, in the names of ``dialect``."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.mask_modules is None:
            del values["mask_modules"]
        else:
            values["mask_modules"] = [list(pair) for pair in self.mask_modules]
        if dialect == "original":
            back = {ours: theirs for theirs, ours in ORIGINAL_NAMES.items()}
            return {back.get(name, name): value for name, value in values.items()}
        return {"model_type": "cpmbee", "architectures": ["CpmBeeForCausalLM"], **values}


def _mask_modules(raw: Any) -> tuple[tuple[bool, bool], ...]:
    if not isinstance(raw, (list, tuple)):
        raise ConfigError("config: mask_modules must be a list of [attention, feed-forward] pairs")
    pairs = []
    for i, pair in enumerate(raw):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or any(p not in (0, 1) for p in pair):
            raise ConfigError(f"config: mask_modules[{i}] must be a pair of booleans, not {shown(pair)}")
        pairs.append((bool(pair[0]), bool(pair[1])))
    return tuple(pairs)
