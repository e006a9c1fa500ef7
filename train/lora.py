"""LoRA: small trainable matrices beside frozen linear layers.

The adapted layer computes ``W x / sqrt(d_in) + alpha / r * B A x``, as OpenDelta and PEFT do; see
`cpmbee.model.lora_saving` for what that means where deltas are merged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cpmbee.errors import ConfigError
from cpmbee.model import CpmBee
from cpmbee.model.layers import Linear
from cpmbee.model.loading import tensor_from_array
from cpmbee.model.lora import LoraDelta, LoraFactors

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraConfig:
    """Which layers get adapters, and of what size.

    Attributes:
        rank: r, rows of A and columns of B.
        alpha: the adapter's output is multiplied by alpha / r.
        targets: names of layers: the last part (``project_q``, ``project_k``, ``project_v``, ``attention_out``,
            ``w_0``, ``w_1``, ``w_out``), more of the path (``layers.3.ffn.ffn.w_out``), or ``all-linear``.
        dropout: of the adapter's input while training.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("project_q", "project_v")
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ConfigError(f"LoRA: the rank must be an integer from 1 on, not {self.rank!r}")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"LoRA: alpha must be a positive number, not {self.alpha!r}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"LoRA: dropout must be a number in [0, 1), not {self.dropout!r}")
        if not self.targets:
            raise ConfigError("LoRA: no target; name layers, such as project_q")

    @classmethod
    def of(cls, delta: LoraDelta, dropout: float = 0.0) -> LoraConfig:
        """The adapters of a delta, its layers by their paths.

        Raises:
            ConfigError: its layers differ in rank or scale, or it is more than LoRA, which cannot be trained further.
        """
        if not delta.plain:
            raise ConfigError(
                f"{delta.path}: DoRA and modules that were trained whole cannot be trained further; merge"
            )
        sizes = {(factors.a.shape[0], factors.scale) for factors in delta.factors.values()}
        if len(sizes) != 1:
            raise ConfigError(f"{delta.path}: layers differ in rank or scale; such a delta cannot be trained further")
        ((rank, scale),) = sizes
        layers = sorted(name.removesuffix(".weight") for name in delta.factors)
        return cls(rank, float(rank * scale), tuple(layers), dropout)


class Adapter(nn.Module):
    """The factors beside one layer.

    Attributes:
        lora_A: (r, d_in), random.
        lora_B: (d_out, r), zero, so that training starts from the base model.
        scale: alpha / r.
    """

    def __init__(self, base: Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        dim_out, dim_in = base.weight.shape
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        device = torch.device("cpu") if base.weight.is_meta else base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, dim_in, device=device))
        self.lora_B = nn.Parameter(torch.zeros(dim_out, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        down = nn.functional.linear(self.dropout(x), self.lora_A)
        return nn.functional.linear(down, self.lora_B) * self.scale


class AdaptedLinear(Linear):
    """A linear layer with an adapter; keeps the weight, and its name, of the layer it replaces."""

    def __init__(self, base: Linear, adapter: Adapter) -> None:
        nn.Module.__init__(self)
        self.scale = base.scale
        self.weight = base.weight
        self.lora = adapter

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_in) -> (..., d_out)."""
        adapted: Tensor = super().forward(x) + self.lora(x)
        return adapted


def add_adapters(model: CpmBee, config: LoraConfig, seed: int = 0) -> list[str]:
    """Put fresh adapters beside a model's layers and freeze everything else.

    Args:
        model: changed; it has none yet.
        config: which layers, and what size.
        seed: of the random factors.

    Returns:
        Names of the adapted layers.

    Raises:
        ConfigError: a target names no layer, or the rank is larger than a layer.
    """
    linears = _linears(model)
    for target in config.targets:
        if target != ALL_LINEAR and not any(_matches(name, target) for name in linears):
            kinds = sorted({name.rpartition(".")[2] for name in linears})
            raise ConfigError(f"LoRA: no layer {target!r}; there are {', '.join(kinds)}, and {ALL_LINEAR} for all")
    chosen = {
        name: layer
        for name, layer in linears.items()
        if any(target == ALL_LINEAR or _matches(name, target) for target in config.targets)
    }
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name, layer in chosen.items():
        if config.rank > min(layer.weight.shape):
            raise ConfigError(f"LoRA: rank {config.rank} is larger than {name}, {tuple(layer.weight.shape)}")
        adapter = Adapter(layer, config.rank, config.alpha / config.rank, config.dropout)
        bound = 1 / math.sqrt(layer.weight.shape[1])
        start = torch.empty(adapter.lora_A.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            adapter.lora_A.copy_(start)
        _replace(model, name, AdaptedLinear(layer, adapter))
    return list(chosen)


def load_adapters(model: CpmBee, delta: LoraDelta, dropout: float = 0.0) -> list[str]:
    """Put the adapters of a delta beside a model's layers, unmerged, and freeze everything else.

    Args:
        model: changed; it has none yet.
        delta: the factors, which are copied.
        dropout: of the adapters' input while training.

    Returns:
        Names of the adapted layers.

    Raises:
        CheckpointError: the delta does not fit the model.
    """
    delta.check(model.config)
    linears = _linears(model)
    model.requires_grad_(False)
    for name, factors in delta.factors.items():
        layer = name.removesuffix(".weight")
        adapter = Adapter(linears[layer], factors.a.shape[0], factors.scale, dropout)
        with torch.no_grad():
            adapter.lora_A.copy_(tensor_from_array(factors.a))
            adapter.lora_B.copy_(tensor_from_array(factors.b))
        _replace(model, layer, AdaptedLinear(linears[layer], adapter))
    return [name.removesuffix(".weight") for name in delta.factors]


def delta_of(model: CpmBee, name: str = "the adapters") -> LoraDelta:
    """What a model's adapters have learned, copied.

    Args:
        model: with adapters.
        name: for messages about the delta.
    """
    factors = {}
    for layer, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            a, b = (_whole(factor).float().cpu().numpy() for factor in (module.lora.lora_A, module.lora.lora_B))
            factors[f"{layer}.weight"] = LoraFactors(a, b, module.lora.scale)
    return LoraDelta(Path(name), factors)


def _whole(parameter: Tensor) -> Tensor:
    """A parameter's values, gathered where it is sharded; a copy."""
    gathered = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return gathered.detach().clone()


def _linears(model: CpmBee) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _replace(model: CpmBee, name: str, layer: AdaptedLinear) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)
