"""LoRA deltas: reading them in OpenDelta's or PEFT's names, and merging them into the weights; no torch in the formula.

The adapted layer adds ``alpha / r * B A x`` to ``W x / sqrt(d_in)``, so that the merged matrix is
``W + sqrt(d_in) * alpha / r * B A``.
"""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpmbee.config import ModelConfig
from cpmbee.errors import CheckpointError
from cpmbee.json_file import read_json_object
from cpmbee.model.tensor_files import Array, open_tensor_file
from cpmbee.model.tensor_names import canonical_name, expected_tensors, is_linear, listed
from cpmbee.staging import recover

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+?)\.(?:lora\.)?lora_(?P<factor>[AB])(?:\.weight)?")
_FOLDER_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin")
_CONFIG_FILES = ("adapter_config.json", "config.json")
# Options of PEFT that change the formula in ways this file does not implement.
_REFUSED_OPTIONS = ("use_dora", "fan_in_fan_out", "alpha_pattern", "modules_to_save", "lora_bias")


@dataclass(frozen=True)
class LoraFactors:
    """The two factors of one layer's delta.

    Attributes:
        a: (r, d_in).
        b: (d_out, r).
        scale: alpha / r, or what the adapter's configuration puts in its place.
    """

    a: Array
    b: Array
    scale: float


@dataclass(frozen=True)
class LoraDelta:
    """A delta for some of a model's linear layers.

    Attributes:
        path: where it was read, for messages.
        factors: canonical tensor name (``....project_q.weight``) -> its factors.
    """

    path: Path
    factors: dict[str, LoraFactors]

    def check(self, config: ModelConfig) -> None:
        """Make sure that every part of the delta has its place in a model of this configuration.

        Raises:
            CheckpointError: a layer that the model does not have, or whose shape is another; names it.
        """
        expected = expected_tensors(config)
        problems = []
        for name, factors in self.factors.items():
            shape = (factors.b.shape[0], factors.a.shape[1])
            if name not in expected or not is_linear(name, expected[name]):
                problems.append(f"the model has no linear layer {name.removesuffix('.weight')}")
            elif expected[name] != shape:
                problems.append(f"the delta of {name} has shape {shape}, expected {expected[name]}")
        if problems:
            raise CheckpointError(f"{self.path}: {listed(problems)}")

    def merge(self, name: str, weight: Array) -> Array:
        """The weight of one layer with its delta added.

        Args:
            name: canonical name of the tensor.
            weight: (d_out, d_in), any float dtype.

        Returns:
            (d_out, d_in) float32; ``weight`` itself, in its own dtype, where the delta does not touch it.
        """
        factors = self.factors.get(name)
        return weight if factors is None else merged_weight(weight, factors)


def merged_weight(weight: Array, factors: LoraFactors) -> npt.NDArray[np.float32]:
    """``W + sqrt(d_in) * scale * B A`` in float32, for ``weight`` (d_out, d_in)."""
    delta: npt.NDArray[np.float32] = factors.b.astype(np.float32) @ factors.a.astype(np.float32)
    delta *= np.float32(math.sqrt(weight.shape[1]) * factors.scale)
    delta += weight.astype(np.float32)
    return delta


def read_lora(path: str | Path, alpha: float | None = None) -> LoraDelta:
    """Read a delta: an OpenDelta file, a PEFT adapter's folder, or a file of either in any tensor format.

    The rank comes from the shapes. Alpha comes from ``adapter_config.json`` or ``config.json`` beside the file
    (``lora_alpha`` or ``alpha``), or is given here where they are silent; it is never guessed.

    Raises:
        CheckpointError: unreadable, a key that belongs to no delta, a factor without its partner, an option that
            changes the formula, no alpha or two; names what is wrong.
        DependencyError: the package that reads the format is not installed.
    """
    path = Path(path)
    recover(path)
    file = open_tensor_file(_find_file(path) if path.is_dir() else path)
    pairs: dict[str, dict[str, Array]] = {}
    problems = []
    for key in file.names():
        match = _KEY.fullmatch(key)
        if match is None or len(file.shape(key)) != 2:
            problems.append(f"{key} is not a LoRA factor")
            continue
        pair = pairs.setdefault(canonical_name(match["layer"]) + ".weight", {})
        if match["factor"] in pair:
            problems.append(f"{key} is there twice, under two spellings")
        pair[match["factor"]] = file.read(key)
    for name, pair in pairs.items():
        layer = name.removesuffix(".weight")
        if missing := {"A", "B"} - set(pair):
            problems.append(f"{layer} has no lora_{missing.pop()}")
        elif pair["A"].shape[0] != pair["B"].shape[1] or pair["A"].shape[0] == 0:
            problems.append(f"{layer} has factors of ranks {pair['A'].shape[0]} and {pair['B'].shape[1]}")
    if problems or not pairs:
        raise CheckpointError(f"{path}: {listed(problems) or 'no LoRA factors'}")
    options = _read_options(file.path)
    alpha = _alpha(path, options, alpha)
    factors = {}
    for name, pair in pairs.items():
        rank = pair["A"].shape[0]
        if not options.get("rank_pattern") and (announced := options.get("r", options.get("lora_r", rank))) != rank:
            raise CheckpointError(f"{path}: {name} has rank {rank}, but the adapter's configuration says {announced}")
        scale = alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)
        factors[name] = LoraFactors(pair["A"], pair["B"], scale)
    return LoraDelta(path, factors)


def _find_file(folder: Path) -> Path:
    for name in _FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: no LoRA delta here ({', '.join(_FOLDER_FILES)}); name the file")


def _read_options(file: Path) -> dict[str, Any]:
    """The adapter's configuration beside its tensors; empty where there is none."""
    for name in _CONFIG_FILES:
        config = file.parent / name
        if not config.is_file():
            continue
        options = read_json_object(config, "the adapter's configuration", CheckpointError)
        if refused := [option for option in _REFUSED_OPTIONS if options.get(option)]:
            raise CheckpointError(f"{config}: {', '.join(refused)} cannot be merged")
        return options
    return {}


def _alpha(path: Path, options: dict[str, Any], alpha: float | None) -> float:
    stated = options.get("lora_alpha", options.get("alpha"))
    given = alpha if stated is None else stated
    if given is None:
        raise CheckpointError(
            f"{path}: no configuration beside it gives the LoRA's alpha (lora_alpha); give the one it was trained with"
        )
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 < given <= sys.float_info.max:
        raise CheckpointError(f"{path}: the LoRA's alpha must be a positive number, not {given!r}")
    if alpha is not None and alpha != given:
        raise CheckpointError(f"{path}: its configuration says alpha {given:g}, not {alpha:g}")
    return float(given)
