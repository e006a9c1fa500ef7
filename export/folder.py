"""All or nothing: an export is written to a hidden folder beside its target and renamed when it is complete.

Whatever interrupts an export (an exception, a full disk, SIGKILL), the target is either what it was before or the new
model. A hidden folder that a killed export left is removed by the next export to the same target; a lock on the folder
tells a dead export from one that is still running.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cpmbee.errors import ExportError
from cpmbee.folder import FORMAT, MANIFEST

REPORT = "export_report.json"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def staged_folder(target: Path, overwrite: bool) -> Iterator[Path]:
    """Give a new empty folder that becomes ``target`` when the block ends without an exception.

    Args:
        target: where the model folder shall be; absent, or an empty folder, unless ``overwrite``.
        overwrite: replace a model folder that is there.

    Raises:
        ExportError: something is there that must not be replaced, or the disk refuses.
    """
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        _require_replaceable(target, overwrite)
        staging = target.parent / f"{_prefix(target)}{secrets.token_hex(4)}"
        staging.mkdir()
        lock = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise ExportError(f"{target}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield staging
        _sync(staging)
        _publish(staging, target, overwrite)
        _sync_entry(target.parent)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:  # not about writing
            raise
        raise ExportError(f"{target}: cannot be written ({error.strerror}); it is what it was before") from error
    finally:
        os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)


def require_space(folder: Path, needed: int) -> None:
    """Refuse early what cannot end well.

    Raises:
        ExportError: the disk of ``folder`` has less than ``needed`` bytes free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ExportError(f"{folder.parent}: the export needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB")


def _prefix(target: Path) -> str:
    return f".{target.name}.exporting-"


def _retired(target: Path) -> Path:
    """Where the folder that is being replaced stays until its successor is in place."""
    return target.parent / f".{target.name}.replaced"


def _remove_leftovers(target: Path) -> None:
    """Finish or undo what a killed export to the same target has left."""
    retired = _retired(target)
    if retired.is_dir() and not retired.is_symlink():
        if target.exists():
            shutil.rmtree(retired)
        else:
            retired.rename(target)
    for folder in target.parent.iterdir():
        if folder.name.startswith(_prefix(target)) and folder.is_dir() and not folder.is_symlink():
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # another export is writing there
            finally:
                os.close(lock)
            shutil.rmtree(folder, ignore_errors=True)


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
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return None
        return {MANIFEST, REPORT, *manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _publish(staging: Path, target: Path, overwrite: bool) -> None:
    _require_replaceable(target, overwrite)  # somebody may have been faster
    if not target.exists() or not any(target.iterdir()):
        staging.rename(target)  # replaces an empty folder, too
        return
    retired = _retired(target)
    target.rename(retired)
    try:
        staging.rename(target)
    except BaseException:
        retired.rename(target)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Make sure that the files are on the disk before the rename is."""
    for entry in folder.iterdir():
        _sync_entry(entry)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(PermissionError):  # some file systems do not sync folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
