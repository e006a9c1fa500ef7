"""Are the files of a model folder the ones that the export wrote?"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cpmbee.errors import ModelFolderError
from cpmbee.export.folder import FORMAT, MANIFEST
from cpmbee.export.report import Check


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of ``engine.json``.

    Raises:
        ModelFolderError: it is not a manifest.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] == FORMAT:
            return dict(manifest)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ModelFolderError(f"{folder}: no {MANIFEST} of an exported model here")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def check_files(folder: Path) -> Check:
    """Compare every file with its hash in the manifest.

    Raises:
        ModelFolderError: a file is missing or altered; names it.
    """
    files = read_manifest(folder)["files"]
    for name, entry in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise ModelFolderError(f"{path}: missing, or not a file in the folder")
        if file_sha256(path) != entry["sha256"]:
            raise ModelFolderError(f"{path}: is not the file that was exported (its hash differs)")
    return Check("files", True, f"{len(files)} files have the hashes in {MANIFEST}")
