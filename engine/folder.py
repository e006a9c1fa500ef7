"""An exported model folder: found complete, unaltered and harmless before anything in it is used."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cpmbee.cache_types import CACHE_DTYPES, CACHE_TYPES, CacheType
from cpmbee.config import ModelConfig
from cpmbee.errors import ModelFolderError
from cpmbee.external_data import places
from cpmbee.generation_config import GenerationConfig
from cpmbee.graph_check import check_graph
from cpmbee.graph_proto import Model, read_model
from cpmbee.graph_rules import RULES, GraphRules
from cpmbee.json_file import read_json_object
from cpmbee.option_values import shown
from cpmbee.regular_file import open_regular
from cpmbee.staging import recover

MANIFEST = "engine.json"
FORMAT = "cpmbee-onnx"
SCHEMA_VERSION = 1
OPS_VERSION = 3  # of the custom ops; older folders use a part of them
HASHED_SIZE = 64 << 20  # larger files are only checked against their hash on request
MAX_GRAPH_BYTES = 16 << 20  # a layer takes about three thousand
GRAPH = "model.onnx"
DEFAULTS = "generation_config.json"  # belongs to the user: it may differ from what the manifest says of it
HUB_FILES = "blobs"  # the folder in which a Hugging Face cache keeps what the folders of its snapshots link to
_T = TypeVar("_T")
_REQUIRED = ("config.json", "vocab.txt", GRAPH, DEFAULTS)
_CHECKPOINT_FILES = ("*.bin", "*.safetensors", "*.pt", "*.ckpt", "*.index.json")


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
        return self.path / GRAPH

    @property
    def weight_bytes(self) -> int:
        """Bytes of the graph and its weights."""
        return sum(file.stat().st_size for file in self.path.glob(f"{self.model.name}*"))

    @property
    def vocabulary(self) -> Path:
        """The tokenizer's tokens."""
        return self.path / "vocab.txt"


def open_folder(
    path: str | Path, *, verify_hashes: bool = False, rules: Mapping[int, GraphRules] = RULES
) -> ModelFolder:
    """Check a model folder.

    Sizes are always compared with ``engine.json``, hashes of files up to 64 MB. Every file that ``engine.json`` or a
    tensor of the graph names has to be in the folder itself, or in the files of the Hugging Face cache around it. The
    graph has to be one that an export may have written.

    Args:
        path: the folder.
        verify_hashes: compare the hashes of larger files, too.
        rules: what the graph may hold, by the schema version of the folder.

    Raises:
        ModelFolderError: something is missing, altered, points out of the folder or is not what an export writes; names
            the file.
        ConfigError: ``config.json`` or ``generation_config.json`` is not valid.
    """
    folder = Path(path)
    recover(folder)
    _check_path(folder)
    manifest = _manifest(folder, rules)
    files: dict[str, Any] = manifest["files"]
    for name in (*_REQUIRED, *files):
        _check_inside(folder, name, MANIFEST)
    for name, entry in files.items():
        if name not in (GRAPH, DEFAULTS):
            _check_file(folder / name, entry, verify_hashes)
    model = _graph(folder, files)
    config = ModelConfig.from_file(folder / "config.json")
    cache = _cache_type(folder, manifest, config)
    try:
        check_graph(model, config, cache, OPS_VERSION, rules[manifest["schema_version"]])
    except ValueError as error:
        raise ModelFolderError(
            f"{folder / GRAPH}: not a graph that cpmbee export writes for this config.json ({error})"
        ) from None
    _require_regular(folder / DEFAULTS)
    defaults = GenerationConfig.from_file(folder / DEFAULTS)
    return ModelFolder(
        path=folder,
        config=config,
        generation_config=defaults,
        precision=manifest["precision"],
        cache=cache,
        block_size=_optional(folder, manifest, "quantization", "block_size", int),
        source_sha256=_optional(folder, manifest, "source", "sha256", str),
    )


def require_utf8(folder: Path) -> None:
    """Refuse a path of a model folder from which nothing can be loaded.

    Raises:
        ModelFolderError: the path is not UTF-8.
    """
    try:
        str(folder).encode("utf-8")
    except UnicodeEncodeError:
        raise ModelFolderError(
            f"{folder}: this path is not UTF-8, and ONNX Runtime opens no others; rename the folder"
        ) from None


def _check_path(folder: Path) -> None:
    """Refuse what is no folder of ours at first sight, and say what it is."""
    require_utf8(folder)
    try:
        mode = folder.stat().st_mode
    except (OSError, ValueError):  # the latter for a zero byte
        raise ModelFolderError(f"{folder}: no such folder; cpmbee export writes one") from None
    is_folder = stat.S_ISDIR(mode)
    if is_folder and (folder / MANIFEST).exists():
        return
    if any(next(folder.glob(name), None) if is_folder else folder.match(name) for name in _CHECKPOINT_FILES):
        raise ModelFolderError(f"{folder}: this is a checkpoint, not a model folder; run cpmbee export {folder} OUT")
    if not is_folder:
        raise ModelFolderError(f"{folder}: a file, not a model folder as cpmbee export writes one")


def _manifest(folder: Path, rules: Mapping[int, GraphRules]) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = read_json_object(path, "the manifest of an exported model", ModelFolderError)
    if manifest.get("format") != FORMAT:
        raise ModelFolderError(f"{path}: not the manifest of an exported model")
    version = manifest.get("schema_version")
    if type(version) is not int or version not in rules:
        known = ", ".join(map(str, rules))
        raise ModelFolderError(
            f"{path}: schema version {shown(version)}, but this version of cpmbee reads {known}; "
            "export the model again, or update cpmbee"
        )
    ops = manifest.get("ops")
    ops_version = ops.get("version") if isinstance(ops, dict) else None
    if type(ops_version) is not int or not 1 <= ops_version <= OPS_VERSION:
        raise ModelFolderError(
            f"{path}: version {shown(ops_version)} of the custom ops, but this version of cpmbee knows 1 to "
            f"{OPS_VERSION}; update cpmbee, or export the model again"
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
        raise ModelFolderError(
            f"{folder / MANIFEST}: {section} must have a {name}, {kind.__name__}, not {shown(value)}"
        )
    return value


def _check_inside(folder: Path, name: str, source: str) -> None:
    """Refuse a name that is not a plain file name, or a link that leads elsewhere."""
    if not name or name in (".", "..") or re.search(r"[/\\:\0]", name):
        raise ModelFolderError(f"{folder / source}: names the file {shown(name)}, which is not inside the folder")
    path = folder / name
    try:
        leads_out = path.is_symlink() and not _may_lead_to(folder.resolve(), path.resolve())
    except (OSError, RuntimeError, ValueError):  # a name that is too long; links in a circle; no UTF-8
        raise ModelFolderError(f"{folder / source}: names the file {shown(name)}, which cannot be opened") from None
    if leads_out:
        raise ModelFolderError(f"{path}: a link that leads out of the folder; copy the file here")


def _may_lead_to(folder: Path, target: Path) -> bool:
    """Whether a link in a folder may lead to a file: one of the folder, or of the hub cache that the folder is in.

    There ``models--NAME/snapshots/REVISION`` holds links to ``models--NAME/blobs``.
    """
    if target.is_relative_to(folder):
        return True
    return any(above.name == "snapshots" and target.parent == above.parent / HUB_FILES for above in folder.parents)


def _require_regular(path: Path) -> os.stat_result:
    """The status of a file that has to be there, not a pipe that never ends."""
    try:
        status = path.stat()
    except OSError:
        raise ModelFolderError(f"{path}: missing; copy the whole folder, or export the model again") from None
    if not stat.S_ISREG(status.st_mode):
        raise ModelFolderError(f"{path}: not a regular file")
    return status


def _check_file(path: Path, entry: Mapping[str, Any], verify_hash: bool) -> None:
    size = _check_size(path, entry)
    if verify_hash or size <= HASHED_SIZE:
        with open_regular(path, "a file of the model", ModelFolderError) as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        _check_hash(path, entry, digest.hexdigest())


def _check_size(path: Path, entry: Mapping[str, Any]) -> int:
    size = _require_regular(path).st_size
    if size != entry["size"]:
        with open_regular(path, "a file of the model", ModelFolderError):  # which knows what may lie in its place
            raise ModelFolderError(f"{path}: {size} bytes instead of {entry['size']}; copy it again")
    return size


def _check_hash(path: Path, entry: Mapping[str, Any], digest: str) -> None:
    if digest != entry["sha256"]:
        raise ModelFolderError(f"{path}: altered since the export (its hash differs from {MANIFEST})")


def _graph(folder: Path, files: Mapping[str, Any]) -> Model:
    """The graph; every data file that a tensor names is in the folder, in the manifest, and long enough."""
    path = folder / GRAPH
    if _check_size(path, files[GRAPH]) > MAX_GRAPH_BYTES:
        raise ModelFolderError(f"{path}: larger than {MAX_GRAPH_BYTES >> 20} MiB, as no graph of an export is")
    with open_regular(path, "the graph", ModelFolderError) as file:
        content = file.read(MAX_GRAPH_BYTES + 1)
    _check_hash(path, files[GRAPH], hashlib.sha256(content).hexdigest())
    try:
        model = read_model(content)
        tensors = places(model.initializers)
    except ValueError as error:
        raise ModelFolderError(
            f"{path}: not an ONNX model that cpmbee export writes, or a damaged one ({error})"
        ) from None
    for location, last in {place.location: place for place in tensors}.items():  # in order, so it is the last of a file
        _check_inside(folder, location, path.name)
        if location not in files:
            raise ModelFolderError(f"{path}: its data file {location} is not listed in {MANIFEST}")
        size = files[location]["size"]
        if last.end > size:
            raise ModelFolderError(f"{folder / location}: {size} bytes, but tensors go up to {last.end}")
    return model


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
    raise ModelFolderError(f"{folder / MANIFEST}: cache is {shown(layout)}, but config.json asks for {expected}")
