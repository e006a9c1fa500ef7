"""LoRA deltas: reading them in OpenDelta's or PEFT's names, and merging them into the weights; no torch in the formula.

The adapted layer adds ``alpha / r * B A x`` to ``W x / sqrt(d_in)``, so that the merged matrix is
``W + sqrt(d_in) * alpha / r * B A``. With DoRA (Liu et al. 2024, as PEFT runs it) the sum is multiplied, output by
output, by ``m / |W + alpha / r * B A|``: the norm is that of the matrix as PEFT sees it, which knows nothing of the
layer's ``1 / sqrt(d_in)``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cpmbee.config import ModelConfig
from cpmbee.errors import CheckpointError
from cpmbee.model.lora_config import read_adapter_config
from cpmbee.model.tensor_files import Array, TensorFile, open_tensor_file
from cpmbee.model.tensor_names import canonical_name, expected_tensors, is_linear, listed
from cpmbee.staging import recover

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<layer>.+?)\.(?:lora\.)?lora_(?P<factor>[AB])(?:\.weight)?")
_MAGNITUDE = re.compile(r"(?P<layer>.+?)\.lora_magnitude_vector(?:\.weight)?")
_FOLDER_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin")


@dataclass(frozen=True)
class LoraFactors:
    """The two factors of one layer's delta.

    Attributes:
        a: (r, d_in).
        b: (d_out, r).
        scale: alpha / r, or what the adapter's configuration puts in its place.
        magnitude: (d_out,) of DoRA; None for plain LoRA.
    """

    a: Array
    b: Array
    scale: float
    magnitude: Array | None = None


@dataclass(frozen=True)
class LoraDelta:
    """A delta for some of a model's linear layers.

    Attributes:
        path: where it was read, for messages.
        factors: canonical tensor name (``....project_q.weight``) -> its factors.
        replaced: canonical tensor name -> the tensor that takes its place, where whole modules were trained.
    """

    path: Path
    factors: dict[str, LoraFactors]
    replaced: dict[str, Array] = field(default_factory=dict)

    @property
    def plain(self) -> bool:
        """Whether it is LoRA and nothing else."""
        return not self.replaced and all(factors.magnitude is None for factors in self.factors.values())

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
        for name, array in self.replaced.items():
            if name not in expected:
                problems.append(f"the model has no tensor {name}")
            elif expected[name] != array.shape:
                problems.append(f"{name} has shape {array.shape}, expected {expected[name]}")
        if problems:
            raise CheckpointError(f"{self.path}: {listed(problems)}")

    def merge(self, name: str, weight: Array) -> Array:
        """One tensor of the model with its delta added, or what takes its place.

        Args:
            name: canonical name of the tensor.
            weight: (d_out, d_in), any float dtype.

        Returns:
            (d_out, d_in) float32; ``weight`` itself, in its own dtype, where the delta does not touch it.
        """
        if name in self.replaced:
            return self.replaced[name].astype(np.float32)
        factors = self.factors.get(name)
        return weight if factors is None else merged_weight(weight, factors)

    def parts(self, name: str) -> tuple[Array, ...]:
        """All that `merge` adds to a tensor's own numbers; empty where it leaves them alone."""
        if name in self.replaced:
            return (self.replaced[name],)
        factors = self.factors.get(name)
        if factors is None:
            return ()
        parts = (factors.a, factors.b, np.array([factors.scale]))
        return parts if factors.magnitude is None else (*parts, factors.magnitude)


def merged_weight(weight: Array, factors: LoraFactors) -> npt.NDArray[np.float32]:
    """``W + sqrt(d_in) * scale * B A`` in float32, for ``weight`` (d_out, d_in); with DoRA its rows are scaled."""
    base = weight.astype(np.float32)
    delta: npt.NDArray[np.float32] = factors.b.astype(np.float32) @ factors.a.astype(np.float32)
    rows = None
    if factors.magnitude is not None:
        norm = np.linalg.norm(base + np.float32(factors.scale) * delta, axis=1)
        rows = factors.magnitude.astype(np.float32) / norm
    delta *= np.float32(math.sqrt(weight.shape[1]) * factors.scale)
    delta += base
    return delta if rows is None else delta * rows[:, None]


def read_lora(path: str | Path, alpha: float | None = None) -> LoraDelta:
    """Read a delta: an OpenDelta file, a PEFT adapter's folder, or a file of either in any tensor format.

    The rank comes from the shapes. Alpha comes from ``adapter_config.json`` or ``config.json`` beside the file
    (``lora_alpha`` or ``alpha``, for some layers ``alpha_pattern``), or is given here where they are silent; it is
    never guessed. DoRA's magnitudes and modules that were trained whole (``modules_to_save``) are read, too.

    Raises:
        CheckpointError: unreadable, a key that belongs to no delta, a factor without its partner, an option that
            changes the formula in a way that cannot be merged, no alpha or two; names what is wrong.
        DependencyError: the package that reads the format is not installed.
    """
    path = Path(path)
    recover(path)
    file = open_tensor_file(_find_file(path) if path.is_dir() else path)
    config = read_adapter_config(path, file.path.parent, alpha)
    pairs, magnitudes, others, problems = _sorted(file)
    replaced: dict[str, Array] = {}
    for name, key in others.items():
        if config.is_whole(name):
            replaced[name] = file.read(key)
        else:
            problems.append(f"{key} is not a LoRA factor")
    problems += [f"{name} is to be saved, but nothing of it is here" for name in config.missing(replaced)]
    problems += _pairing(pairs)
    dora = set(pairs) if config.dora else set()
    for name in sorted(dora ^ set(magnitudes)):
        layer = name.removesuffix(".weight")
        problems.append(f"{layer} has {'no' if name in dora else 'a'} magnitude, against the configuration's use_dora")
    for name, magnitude in magnitudes.items():
        if name in pairs and "B" in pairs[name] and len(magnitude) != len(pairs[name]["B"]):
            problems.append(f"{name.removesuffix('.weight')} has {len(magnitude)} magnitudes")
    if problems or not (pairs or replaced):
        raise CheckpointError(f"{path}: {listed(problems) or 'no LoRA factors'}")
    factors = {}
    for name, pair in pairs.items():
        scale = config.scale(name.removesuffix(".weight"), len(pair["A"]))
        factors[name] = LoraFactors(pair["A"], pair["B"], scale, magnitudes.get(name))
    return LoraDelta(path, factors, replaced)


def _find_file(folder: Path) -> Path:
    for name in _FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: no LoRA delta here ({', '.join(_FOLDER_FILES)}); name the file")


def _sorted(file: TensorFile) -> tuple[dict[str, dict[str, Array]], dict[str, Array], dict[str, str], list[str]]:
    """Pairs of factors and magnitudes by tensor, keys of what is neither, and what is wrong with any."""
    pairs: dict[str, dict[str, Array]] = {}
    magnitudes: dict[str, Array] = {}
    others: dict[str, str] = {}
    problems = []
    for key in file.names():
        bare = key.removeprefix(_PREFIX)
        if match := _FACTOR.fullmatch(bare):
            name = canonical_name(match["layer"]) + ".weight"
            kind, found, dims = match["factor"], pairs.setdefault(name, {}), 2
        elif match := _MAGNITUDE.fullmatch(bare):
            kind, found, dims = canonical_name(match["layer"]) + ".weight", magnitudes, 1
        else:
            name = canonical_name(bare)
            if name in others:
                problems.append(f"{key} is there twice, under two spellings")
            others[name] = key
            continue
        if len(file.shape(key)) != dims:
            problems.append(f"{key} is not a LoRA factor")
            continue
        if kind in found:
            problems.append(f"{key} is there twice, under two spellings")
        found[kind] = file.read(key)
    return pairs, magnitudes, others, problems


def _pairing(pairs: dict[str, dict[str, Array]]) -> list[str]:
    problems = []
    for name, pair in pairs.items():
        layer = name.removesuffix(".weight")
        if missing := {"A", "B"} - set(pair):
            problems.append(f"{layer} has no lora_{missing.pop()}")
        elif pair["A"].shape[0] != pair["B"].shape[1] or pair["A"].shape[0] == 0:
            problems.append(f"{layer} has factors of ranks {pair['A'].shape[0]} and {pair['B'].shape[1]}")
    return problems
