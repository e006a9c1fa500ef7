"""All or nothing: a folder is written under a hidden name beside its target and renamed when it is complete.

Whatever interrupts the writing (an exception, a full disk, SIGKILL), the target is either what it was before or the new
folder. A hidden folder that a killed process left is removed by the next one that writes to the same target; a lock on
the folder tells a dead writer from one that is still running.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cpmbee.errors import CpmBeeError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def staged_folder(
    target: Path, activity: str, error_class: type[CpmBeeError], require_replaceable: Callable[[Path], None]
) -> Iterator[Path]:
    """Give a new empty folder that becomes ``target`` when the block ends without an exception.

    Args:
        target: where the folder shall be.
        activity: part of the hidden name, such as ``exporting``; writers of one kind clean up after each other.
        error_class: raised where the disk refuses.
        require_replaceable: raises where something is at ``target`` that must not be replaced; called twice, as
            somebody else may be faster.

    Raises:
        CpmBeeError: as ``error_class``: the disk refuses; names ``target``.
    """
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target, activity)
        require_replaceable(target)
        staging = target.parent / f"{_prefix(target, activity)}{secrets.token_hex(4)}"
        staging.mkdir()
        lock = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise error_class(f"{target}: cannot be written ({error.strerror})") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield staging
        sync_folder(staging)
        require_replaceable(target)
        _publish(staging, target)
        sync_entry(target.parent)
    except OSError as error:
        if error.errno not in _DISK_ERRORS:  # not about writing
            raise
        raise error_class(f"{target}: cannot be written ({error.strerror}); it is what it was before") from error
    finally:
        os.close(lock)
        shutil.rmtree(staging, ignore_errors=True)


def retired_path(target: Path) -> Path:
    """Where the folder that is being replaced stays until its successor is in place."""
    return target.parent / f".{target.name}.replaced"


def _prefix(target: Path, activity: str) -> str:
    return f".{target.name}.{activity}-"


def _remove_leftovers(target: Path, activity: str) -> None:
    """Finish or undo what a killed writer of the same target has left."""
    retired = retired_path(target)
    if retired.is_dir() and not retired.is_symlink():
        if target.exists():
            shutil.rmtree(retired)
        else:
            retired.rename(target)
    for folder in target.parent.iterdir():
        if folder.name.startswith(_prefix(target, activity)) and folder.is_dir() and not folder.is_symlink():
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # another one is writing there
            finally:
                os.close(lock)
            shutil.rmtree(folder, ignore_errors=True)


def _publish(staging: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        staging.rename(target)  # replaces an empty folder, too
        return
    retired = retired_path(target)
    target.rename(retired)
    try:
        staging.rename(target)
    except BaseException:
        retired.rename(target)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Force a folder and its files to the disk, so that a power cut after a rename finds them whole."""
    for entry in folder.iterdir():
        sync_entry(entry)
    sync_entry(folder)


def sync_entry(path: Path) -> None:
    """Force a file, or what a folder lists, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(PermissionError):  # some file systems do not sync folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
