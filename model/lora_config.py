"""The configuration beside an adapter's tensors, read by an allow-list: what changes the formula is refused by name.

PEFT's options are those of its ``LoraConfig``. An option that this file does not know is fine as long as it is switched
off; switched on, it could mean anything.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpmbee.errors import CheckpointError
from cpmbee.json_file import read_json_object
from cpmbee.model.tensor_names import HUGGINGFACE_PREFIX

_PEFT, _OPENDELTA = "adapter_config.json", "config.json"
# Where training begins. These leave the base model as it is; all others take a part of it away, which an adapter that
# PEFT has not converted (`path_initial_model_for_weight_conversion`) does not tell.
_PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
_READ = ("r", "lora_alpha", "use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "modules_to_save")
# Where an adapter was put, how it was trained or by whom: the names and numbers of its tensors say what it computes.
_NEUTRAL = (
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
_NAME = re.compile(r"\^?[\w.]+")  # of a module, or its end; a regular expression of strangers may take for ever


@dataclass(frozen=True)
class AdapterConfig:
    """What the configuration of an adapter says about the formula.

    Attributes:
        path: of the adapter, for messages.
        rank: of layers that have none of their own; None where nothing is said.
        alpha: likewise.
        ranks: of some layers, by their names or the ends of those.
        alphas: likewise.
        rslora: alpha is divided by the root of the rank.
        dora: every output has a magnitude.
        whole_modules: names, or their ends, of modules that were trained whole.
    """

    path: Path
    rank: int | None = None
    alpha: float | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    dora: bool = False
    whole_modules: tuple[str, ...] = ()

    def scale(self, layer: str, rank: int) -> float:
        """What the product of the factors of a layer is multiplied by.

        Args:
            layer: canonical name.
            rank: of its factors.

        Raises:
            CheckpointError: another rank was announced, or nothing says what alpha is.
        """
        announced = _matching(self.ranks, layer, self.rank)
        if announced is not None and announced != rank:
            raise CheckpointError(
                f"{self.path}: {layer} has rank {rank}, but the adapter's configuration says {announced}"
            )
        alpha: float | None = _matching(self.alphas, layer, self.alpha)
        if alpha is None:
            raise CheckpointError(
                f"{self.path}: no configuration beside it gives the LoRA's alpha (lora_alpha); give the one it was "
                "trained with"
            )
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def is_whole(self, tensor: str) -> bool:
        """Whether a tensor, by its canonical name, belongs to a module that was trained whole."""
        return any(_is_of(tensor, name) for name in self.whole_modules)

    def missing(self, tensors: Iterable[str]) -> list[str]:
        """Modules that were trained whole, and of which there is no tensor."""
        there = list(tensors)
        return [name for name in self.whole_modules if not any(_is_of(tensor, name) for tensor in there)]


def read_adapter_config(adapter: Path, folder: Path, alpha: float | None) -> AdapterConfig:
    """The configuration in the folder of an adapter's tensors; an empty one where there is none.

    Args:
        adapter: for messages.
        folder: where the tensors are.
        alpha: what the caller says it is; where the configuration says so, too, they must agree.

    Raises:
        CheckpointError: an option that changes the formula in a way that is not known here, or a value that makes no
            sense; names the file.
    """
    if (folder / _PEFT).exists():
        options = read_json_object(folder / _PEFT, "the adapter's configuration", CheckpointError)
        return _peft(adapter, folder / _PEFT, options, alpha)
    if (folder / _OPENDELTA).exists():
        options = read_json_object(folder / _OPENDELTA, "the adapter's configuration", CheckpointError)
        if options.get("peft_type") is not None:
            return _peft(adapter, folder / _OPENDELTA, options, alpha)
        kind = options.get("delta_type", "lora")
        if kind != "lora":
            raise CheckpointError(f"{folder / _OPENDELTA}: a delta of type {kind!r}; only lora can be merged")
        stated = options.get("lora_alpha", options.get("alpha"))
        rank = options.get("lora_r", options.get("r"))
        return AdapterConfig(adapter, _optional_rank(folder / _OPENDELTA, rank), _alpha(adapter, stated, alpha))
    return AdapterConfig(adapter, alpha=_alpha(adapter, None, alpha))


def _peft(adapter: Path, file: Path, options: Mapping[str, Any], alpha: float | None) -> AdapterConfig:
    kind = options.get("peft_type") or "LORA"
    if kind != "LORA":
        raise CheckpointError(f"{file}: an adapter of type {kind!r}; only LORA can be merged")
    start = options.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{file}: init_lora_weights is {start!r}, which changes the base model, too; save the adapter with "
            "path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )
    if options.get("bias") not in (None, "none"):
        raise CheckpointError(f"{file}: bias is {options['bias']!r}, but the model has none")
    known = {*_READ, *_NEUTRAL, "peft_type", "init_lora_weights", "bias"}
    if unknown := sorted(name for name, value in options.items() if name not in known and value):
        raise CheckpointError(
            f"{file}: {', '.join(unknown[:5])} cannot be merged: it changes what the adapter computes"
        )
    return AdapterConfig(
        adapter,
        rank=_optional_rank(file, options.get("r")),
        alpha=_alpha(adapter, options.get("lora_alpha"), alpha),
        ranks={name: _rank(file, value) for name, value in _pattern(file, options, "rank_pattern").items()},
        alphas={name: _number(adapter, value) for name, value in _pattern(file, options, "alpha_pattern").items()},
        rslora=_flag(file, options, "use_rslora"),
        dora=_flag(file, options, "use_dora"),
        whole_modules=_modules(file, options.get("modules_to_save")),
    )


def _is_of(tensor: str, module: str) -> bool:
    path = HUGGINGFACE_PREFIX + tensor.rpartition(".")[0]
    return path == module or path.endswith(f".{module}")


def _matching(pattern: Mapping[str, Any], layer: str, default: Any) -> Any:
    """The value of the first name that is a layer's, or its end, as PEFT looks it up."""
    module = HUGGINGFACE_PREFIX + layer
    for name, value in pattern.items():
        whole = name.removeprefix("^")
        if module in (whole, f"base_model.model.{whole}") or (whole == name and module.endswith(f".{name}")):
            return value
    return default


def _pattern(file: Path, options: Mapping[str, Any], option: str) -> dict[str, Any]:
    values = options.get(option) or {}
    if not isinstance(values, dict) or not all(_NAME.fullmatch(name) for name in values):
        raise CheckpointError(f"{file}: {option} must give values to names of layers, or to the ends of names")
    return values


def _modules(file: Path, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise CheckpointError(f"{file}: modules_to_save must be a list of names")
    return tuple(value)


def _flag(file: Path, options: Mapping[str, Any], option: str) -> bool:
    value = options.get(option)
    if value not in (None, True, False):
        raise CheckpointError(f"{file}: {option} must be true or false, not {value!r}")
    return bool(value)


def _rank(file: Path, value: object) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{file}: a rank must be an integer from 1 on, not {value!r}")
    return value


def _optional_rank(file: Path, value: object) -> int | None:
    return None if value is None else _rank(file, value)


def _alpha(adapter: Path, stated: object, given: float | None) -> float | None:
    value = given if stated is None else stated
    if value is None:
        return None
    number = _number(adapter, value)
    if given is not None and given != number:
        raise CheckpointError(f"{adapter}: its configuration says alpha {number:g}, not {given:g}")
    return number


def _number(adapter: Path, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise CheckpointError(f"{adapter}: the LoRA's alpha must be a positive number, not {value!r}")
    return float(value)
