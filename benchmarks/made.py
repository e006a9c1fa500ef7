"""Models that are made once, and taken again as long as making them again would give the same."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cpmbee.bench.environment import versions
from cpmbee.errors import ModelFolderError
from cpmbee.folder import MANIFEST
from cpmbee.json_file import read_json_object

NOTE_SUFFIX = ".origin.json"


def made_once(path: Path, origin: Mapping[str, Any], write: Callable[[Path], object]) -> Path:
    """A file or folder that ``write`` made, now or in an earlier run; none is left that it made only in part.

    Args:
        path: to make; ``origin`` is kept beside it and looked at before it is taken again.
        origin: all that it depends on, JSON-ready.
        write: makes it at the path that it is given.

    Raises:
        FileExistsError: there is something called ``path`` that was not made here.
    """
    note = _note(path)
    text = json.dumps(origin, indent=1, sort_keys=True) + "\n"
    if path.exists():
        if not note.is_file():
            raise FileExistsError(f"{path}: was not made by cpmbee bench (there is no {note.name}); move it away")
        if note.read_text(encoding="utf-8") == text:
            return path
        _remove(path)
    partial = path.with_name(f".{path.name}.partial")
    _remove(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    write(partial)
    note.write_text(text, encoding="utf-8")
    partial.rename(path)
    return path


def remove_made(path: Path) -> None:
    """Delete what `made_once` made, and its note; leave alone what was not made here."""
    if _note(path).is_file():
        _remove(path)
        _note(path).unlink()


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}{NOTE_SUFFIX}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def folder_identity(folder: Path) -> dict[str, Any]:
    """What tells a model folder from another one of its name: the manifest's hash, sizes and times of its files."""
    manifest = read_json_object(folder / MANIFEST, "the manifest of an exported model", ModelFolderError)
    times = {name: [(about := (folder / name).stat()).st_size, about.st_mtime_ns] for name in manifest["files"]}
    return {"manifest": hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(), "files": times}


def code_identity(*modules: str) -> dict[str, Any]:
    """Hash of the source of modules that write something, packages with all that is in them, and what they run on."""
    digest = hashlib.sha256()
    for name in modules:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(name)
        origin = Path(spec.origin)
        files = sorted(origin.parent.glob("*.py")) if origin.name == "__init__.py" else [origin]
        for file in files:
            digest.update(file.read_bytes())
    return {"code": digest.hexdigest(), "versions": versions()}
