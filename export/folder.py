"""What an export may replace, and how it becomes visible: all or nothing (`cpmbee.staging`)."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cpmbee import staging
from cpmbee.errors import ExportError
from cpmbee.folder import FORMAT, MANIFEST
from cpmbee.json_file import read_json_object
from cpmbee.outputs import FolderKind, require_replaceable

REPORT = "export_report.json"


def _require_manifest(folder: Path) -> None:
    """Refuse a folder that no export wrote.

    Raises:
        ExportError: it has no manifest of an exported model.
    """
    manifest = read_json_object(folder / MANIFEST, "the manifest of an exported model", ExportError)
    if manifest.get("format") != FORMAT:
        raise ExportError(f"{folder / MANIFEST}: not the manifest of an exported model")


MODEL_FOLDER = FolderKind(
    "a folder that an export wrote",
    re.compile(rf"(config|generation_config)\.json|vocab\.txt|model\.onnx(\.data)?|{re.escape(MANIFEST)}|{REPORT}"),
    _require_manifest,
)


@contextmanager
def staged_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give a new empty folder that becomes ``target`` when the block ends without an exception.

    Args:
        target: where the model folder shall be; absent, or an empty folder, unless ``overwrite``.
        overwrite: replace a model folder that is there.

    Raises:
        ExportError: something is there that must not be replaced, or the disk refuses.
    """

    def replaceable(folder: Path) -> None:
        require_replaceable(folder, MODEL_FOLDER, overwrite, ExportError)

    with staging.staged_folder(target, ExportError, replaceable) as folder:
        yield folder


def require_space(folder: Path, needed: int) -> None:
    """Refuse early what cannot end well.

    Raises:
        ExportError: the disk of ``folder`` has less than ``needed`` bytes free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(f"{folder.parent}: the export needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB")
