"""An exported model folder: found complete, unaltered and harmless before anything in it is used."""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cpmbee.cache_types import CACHE_DTYPES, CACHE_TYPES, CacheType
from cpmbee.config import ModelConfig
from cpmbee.errors import ModelFolderError
from cpmbee.external_data import external_data
from cpmbee.generation_config import GenerationConfig
from cpmbee.json_file import read_json_object
from cpmbee.staging import recover

MANIFEST = "engine.json"
FORMAT = "cpmbee-onnx"
SCHEMA_VERSION = 1
OPS_VERSION = 3  # of the custom ops; older folders use a part of them
HASHED_SIZE = 64 << 20  # larger files are only checked against their hash on request
_T = TypeVar("_T")
_REQUIRED = ("config.json", "vocab.txt", "model.onnx", "generation_config.json")


@dataclass(frozen=True)
class ModelFolder:
    """A checked folder.

    Attributes:
        path: where it is.
        config: the model's configuration.
        generation_config: its default options.
        precision: storage type of each tensor group.
        cache: storage type of cache rows.
        block_size: weights that share a scale, where matrices are quantized; else None.
        source_sha256: hash of the tensors that it was exported from.
    """

    path: Path
    config: ModelConfig
    generation_config: GenerationConfig
    precision: Mapping[str, str]
    cache: CacheType
    block_size: int | None
    source_sha256: str | None

    @property
    def model(self) -> Path:
        """The graph."""
        return self.path / "model.onnx"

    @property
    def vocabulary(self) -> Path:
        """The tokenizer's tokens."""
        return self.path / "vocab.txt"


def open_folder(path: str | Path, *, verify_hashes: bool = False) -> ModelFolder:
    """Check a model folder.

    Sizes are always compared with ``engine.json``, hashes of files up to 64 MB. Every file that ``engine.json`` or a
    tensor of the graph names has to be in the folder itself.

    Args:
        path: the folder.
        verify_hashes: compare the hashes of larger files, too.

    Raises:
        ModelFolderError: something is missing, altered or points out of the folder; names the file.
        ConfigError: ``config.json`` or ``generation_config.json`` is not valid.
    """
    folder = Path(path)
    recover(folder)
    if not folder.is_dir():
        raise ModelFolderError(f"{folder}: no such folder; cpmbee export writes one")
    manifest = _manifest(folder)
    files: dict[str, Any] = manifest["files"]
    for name in (*_REQUIRED, *files):
        _check_inside(folder, name, MANIFEST)
    for name, entry in files.items():
        _check_file(folder / name, entry, verify_hashes)
    _check_graph(folder, files)
    config = ModelConfig.from_file(folder / "config.json")
    cache = _cache_type(folder, manifest, config)
    defaults = GenerationConfig.from_file(folder / "generation_config.json")
    return ModelFolder(
        path=folder,
        config=config,
        generation_config=defaults,
        precision=manifest["precision"],
        cache=cache,
        block_size=_optional(folder, manifest, "quantization", "block_size", int),
        source_sha256=_optional(folder, manifest, "source", "sha256", str),
    )


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = read_json_object(path, "the manifest of an exported model", ModelFolderError)
    if manifest.get("format") != FORMAT:
        raise ModelFolderError(f"{path}: not the manifest of an exported model")
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ModelFolderError(
            f"{path}: schema version {version!r}, but this version of cpmbee reads {SCHEMA_VERSION}; "
            "export the model again, or update cpmbee"
        )
    ops = manifest.get("ops")
    ops_version = ops.get("version") if isinstance(ops, dict) else None
    if type(ops_version) is not int or not 1 <= ops_version <= OPS_VERSION:
        raise ModelFolderError(
            f"{path}: version {ops_version!r} of the custom ops, but this version of cpmbee knows 1 to {OPS_VERSION}; "
            "update cpmbee, or export the model again"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(_is_entry(entry) for entry in files.values()):
        raise ModelFolderError(f"{path}: files must map names to size and sha256")
    precision = manifest.get("precision")
    if not isinstance(precision, dict) or not all(isinstance(kind, str) for kind in precision.values()):
        raise ModelFolderError(f"{path}: precision must map groups of tensors to types")
    if missing := [name for name in _REQUIRED if name not in files]:
        raise ModelFolderError(f"{path}: does not list {', '.join(missing)}")
    return manifest


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or type(entry.get("size")) is not int:
        return False
    return isinstance(entry.get("sha256"), str) and re.fullmatch("[0-9a-f]{64}", entry["sha256"]) is not None


def _optional(folder: Path, manifest: Mapping[str, Any], section: str, name: str, kind: type[_T]) -> _T | None:
    """What a section of the manifest says, or None where there is no such section."""
    if section not in manifest:
        return None
    values = manifest[section]
    value = values.get(name) if isinstance(values, dict) else None
    if type(value) is not kind:
        raise ModelFolderError(f"{folder / MANIFEST}: {section} must have a {name}, {kind.__name__}, not {value!r}")
    return value


def _check_inside(folder: Path, name: str, source: str) -> None:
    """Refuse a name that is not a plain file name, or a link that leads out of the folder."""
    if not name or name in (".", "..") or re.search(r"[/\\:\0]", name):
        raise ModelFolderError(f"{folder / source}: names the file {name!r}, which is not inside the folder")
    path = folder / name
    try:
        leads_out = path.is_symlink() and path.resolve().parent != folder.resolve()
    except (OSError, RuntimeError):  # a name that is too long; links in a circle
        raise ModelFolderError(f"{folder / source}: names the file {name[:80]!r}, which cannot be opened") from None
    if leads_out:
        raise ModelFolderError(f"{path}: a link that leads out of the folder; copy the file here")


def _check_file(path: Path, entry: Mapping[str, Any], verify_hash: bool) -> None:
    if not path.is_file():
        raise ModelFolderError(f"{path}: missing; copy the whole folder, or export the model again")
    size = path.stat().st_size
    if size != entry["size"]:
        raise ModelFolderError(f"{path}: {size} bytes instead of {entry['size']}; copy it again")
    if verify_hash or size <= HASHED_SIZE:
        with path.open("rb") as file:
            digest = _sha256(file)
        if digest != entry["sha256"]:
            raise ModelFolderError(f"{path}: altered since the export (its hash differs from {MANIFEST})")


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _check_graph(folder: Path, files: Mapping[str, Any]) -> None:
    """Every data file that a tensor names is in the folder, in the manifest, and long enough."""
    path = folder / "model.onnx"
    if not path.stat().st_size:
        raise ModelFolderError(f"{path}: empty")
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # not closed here: an error may still look at it
    try:
        tensors = set(external_data(memoryview(content)))
    except ModelFolderError as error:
        raise ModelFolderError(f"{path}: {error}") from None
    for location, end in tensors:
        _check_inside(folder, location, path.name)
        if location not in files:
            raise ModelFolderError(f"{path}: its data file {location} is not listed in {MANIFEST}")
        if end > files[location]["size"]:
            raise ModelFolderError(f"{folder / location}: {files[location]['size']} bytes, but tensors go up to {end}")


def cache_layout(config: ModelConfig, cache: CacheType) -> dict[str, Any]:
    """What the manifest says about the cache."""
    return {
        "num_layers": len(config.attention_layers),
        "num_heads": config.num_attention_heads,
        "dim_head": config.dim_head,
        "dtype": CACHE_DTYPES[cache],
    }


def _cache_type(folder: Path, manifest: Mapping[str, Any], config: ModelConfig) -> CacheType:
    layout = manifest.get("cache")
    for cache in CACHE_TYPES:
        if layout == cache_layout(config, cache):
            return cache
    expected = {**cache_layout(config, "fp32"), "dtype": " or ".join(CACHE_DTYPES.values())}
    raise ModelFolderError(f"{folder / MANIFEST}: cache is {layout!r}, but config.json asks for {expected}")
