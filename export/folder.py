"""What an export may replace, and how it becomes visible: all or nothing (`cpmbee.staging`)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpmbee import staging
from cpmbee.errors import ExportError
from cpmbee.folder import FORMAT, MANIFEST
from cpmbee.json_file import read_json_object

REPORT = "export_report.json"


@contextmanager
def staged_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give a new empty folder that becomes ``target`` when the block ends without an exception.

    Args:
        target: where the model folder shall be; absent, or an empty folder, unless ``overwrite``.
        overwrite: replace a model folder that is there.

    Raises:
        ExportError: something is there that must not be replaced, or the disk refuses.
    """

    def require_replaceable(folder: Path) -> None:
        _require_replaceable(folder, overwrite)

    with staging.staged_folder(target, "exporting", ExportError, require_replaceable) as folder:
        yield folder


def require_space(folder: Path, needed: int) -> None:
    """Refuse early what cannot end well.

    Raises:
        ExportError: the disk of ``folder`` has less than ``needed`` bytes free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(f"{folder.parent}: the export needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB")


def _require_replaceable(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ExportError(f"{target}: is a file; name a folder that does not exist yet")
    present = {entry.name for entry in target.iterdir()}
    if not present:
        return
    if not overwrite:
        raise ExportError(f"{target}: already exists; choose another folder, or overwrite it (--overwrite)")
    own = _own_files(target)
    if own is None:
        raise ExportError(f"{target}: is not a folder that an export wrote, so it is not overwritten")
    if foreign := sorted(present - own):
        raise ExportError(f"{target}: holds {foreign[0]}, which no export wrote, so it is not overwritten")


def _own_files(folder: Path) -> set[str] | None:
    """Names of what an export wrote to ``folder``, or None where none did."""
    try:
        manifest = read_json_object(folder / MANIFEST, "the manifest of an exported model", ExportError)
    except ExportError:
        return None
    files = manifest.get("files")
    return {MANIFEST, REPORT, *files} if manifest.get("format") == FORMAT and isinstance(files, dict) else None
