"""Names and shapes of a checkpoint's tensors, in the two dialects that published checkpoints use.

The research code's names are canonical. Hugging Face puts ``cpmbee.`` before each of them and may repeat the embedding
as ``lm_head.weight``.
"""

from __future__ import annotations

from collections.abc import Sequence

from cpmbee.config import ModelConfig

HUGGINGFACE_PREFIX = "cpmbee."
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")  # of data parallelism, `torch.compile` and training scripts
TIED_HEAD = "lm_head.weight"
EMBEDDING = "input_embedding.weight"
BIAS_TABLE = "position_bias.relative_attention_bias"

_LISTED = 5  # problems an error spells out; the rest are counted


def canonical_name(name: str) -> str:
    """The research code's name of a tensor of either dialect."""
    return name.removeprefix(HUGGINGFACE_PREFIX)


def wrapper_prefix(names: Sequence[str]) -> str:
    """What wrappers of a model put before the names of all its tensors, in any order; empty where some lack it."""
    prefix = ""
    while names:
        for added in WRAPPER_PREFIXES:
            if all(name.startswith(prefix + added) for name in names):
                prefix += added
                break
        else:
            break
    return prefix


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor that a checkpoint of this configuration has, in layer order."""
    hidden, heads, ff = config.hidden_size, config.attention_dim, config.dim_ff
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, hidden),
        BIAS_TABLE: (config.num_bias_rows, config.num_attention_heads),
    }
    attention_layers, ffn_layers = set(config.attention_layers), set(config.ffn_layers)
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layers.{i}"
        if i in attention_layers:
            shapes[f"{layer}.self_att.layernorm_before_attention.weight"] = (hidden,)
            for projection in ("project_q", "project_k", "project_v"):
                shapes[f"{layer}.self_att.self_attention.{projection}.weight"] = (heads, hidden)
            shapes[f"{layer}.self_att.self_attention.attention_out.weight"] = (hidden, heads)
        if i in ffn_layers:
            shapes[f"{layer}.ffn.layernorm_before_ffn.weight"] = (hidden,)
            shapes[f"{layer}.ffn.ffn.w_in.w_0.weight"] = (ff, hidden)
            shapes[f"{layer}.ffn.ffn.w_in.w_1.weight"] = (ff, hidden)
            shapes[f"{layer}.ffn.ffn.w_out.weight"] = (hidden, ff)
    shapes["encoder.output_layernorm.weight"] = (hidden,)
    return shapes


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a canonical tensor is the matrix of a linear layer (what LoRA can change)."""
    return name.startswith("encoder.") and len(shape) == 2


def listed(problems: list[str]) -> str:
    """The first few problems, and how many more there are."""
    more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    return "; ".join(problems[:_LISTED]) + more
