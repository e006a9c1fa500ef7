"""What a model's work amounts to: bytes and operations, from its shape alone; the limits that times are held against.

A multiplication and the addition of its product are two operations, as in all published rates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cpmbee.config import ModelConfig
from cpmbee.model.tensor_names import expected_tensors


@dataclass(frozen=True)
class Operations:
    """Of a model that reads T tokens of one sequence: ``token * T + pair * T**2 + head`` (one position's logits).

    Attributes:
        token: of a token in the matrices of all layers.
        pair: of a query and a key in all attention layers.
        head: of one position's logits.
    """

    token: float
    pair: float
    head: float

    def prefill(self, tokens: int) -> float:
        """Of reading ``tokens`` tokens."""
        return self.token * tokens + self.pair * tokens**2 + self.head


def operations(config: ModelConfig) -> Operations:
    """Of our model: every token of a prompt sees every other one."""
    matrices = [
        math.prod(shape)
        for name, shape in expected_tensors(config).items()
        if len(shape) == 2 and name.startswith("encoder.")
    ]
    return Operations(
        token=2.0 * sum(matrices),
        pair=4.0 * config.attention_dim * len(config.attention_layers),
        head=2.0 * config.vocab_size * config.hidden_size,
    )


def num_parameters(config: ModelConfig) -> int:
    """Numbers in all tensors of a model."""
    return sum(math.prod(shape) for shape in expected_tensors(config).values())


def cache_row_bytes(config: ModelConfig, number_bytes: int) -> int:
    """Bytes of the keys and values that one token takes in the cache, in numbers of so many bytes."""
    return 2 * number_bytes * len(config.attention_layers) * config.attention_dim
