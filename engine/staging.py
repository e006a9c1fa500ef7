"""All or nothing: a folder or file is written under a hidden name beside its target, and published when it is complete.

Whatever interrupts the writing (an exception, a full disk, SIGKILL), the target is either what it was before or the new
one, at every instant: names are exchanged in one step where the system can do that. Where it cannot, the old folder is
put aside for a moment, and `recover` brings it back if the writer was killed in that moment; all that read such folders
call it first. Hidden leftovers of killed processes are removed by the next one that writes to the same target; a lock
tells a dead writer from one that is still running.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from cpmbee.errors import CpmBeeError
from cpmbee.file_system import Lock, exchange, sync_entry, sync_folder

_DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EBUSY),
    *(errno.ENOTEMPTY, errno.EEXIST),  # somebody else was faster
    errno.EXDEV,  # a folder of the lower layer of a container cannot be renamed
)
_WRITING, _ASIDE = "writing", "replaced"


@contextmanager
def staged_folder(
    target: Path, error_class: type[CpmBeeError], require_replaceable: Callable[[Path], None]
) -> Iterator[Path]:
    """Give a new empty folder that becomes ``target`` when the block ends without an exception.

    Args:
        target: where the folder shall be; a link is followed.
        error_class: raised where the disk refuses.
        require_replaceable: raises where something is at ``target`` that must not be replaced
            (`cpmbee.outputs.require_replaceable`); called twice, as somebody else may be faster.

    Raises:
        CpmBeeError: as ``error_class``: the disk refuses; names ``target``, or the file in it.
    """
    target = target.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _recover(target)
        _remove_leftovers(target)
        require_replaceable(target)
        staging, lock = _new_staging(target, Path.mkdir)
    except OSError as error:
        raise error_class(f"{target}: cannot be written ({error.strerror})") from None
    try:
        yield staging
        sync_folder(staging)
        require_replaceable(target)
        _publish(staging, target)
        sync_entry(target.parent)
    except OSError as error:
        place = _in_target(error, staging, target)
        if error.errno not in _DISK_ERRORS or place is None:
            raise  # not about writing
        raise error_class(
            f"{place}: cannot be written ({error.strerror}); {target.name} is what it was before"
        ) from error
    finally:
        _recover(target)  # first of all, should the old one have been put aside
        shutil.rmtree(staging, ignore_errors=True)  # the old one, where it has been replaced
        lock.close()


@contextmanager
def staged_file(path: Path) -> Iterator[TextIO]:
    """Give a text file, UTF-8, that becomes ``path`` when the block ends without an exception.

    A device, a pipe or what a process has opened (``/dev/stdout``) is written to as it is: a file must not take its
    place. A link is followed.

    Raises:
        OSError: ``path`` is a folder, lies in none, or cannot be written; names it.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
    if path.exists() and not _can_be_replaced(path):
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    try:
        _remove_leftovers(path)
        staging, lock = _new_staging(path, lambda name: name.touch(exist_ok=False))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None  # not the name of a file nobody asked for
    try:
        with staging.open("w", encoding="utf-8") as file:
            yield file
        with suppress(FileNotFoundError):
            os.chmod(staging, stat.S_IMODE(path.stat().st_mode))
        sync_entry(staging)
        os.replace(staging, path)
        sync_entry(path.parent)
    except OSError as error:
        if error.errno not in _DISK_ERRORS or _in_target(error, staging, path) is None:
            raise  # not about writing
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        staging.unlink(missing_ok=True)
        lock.close()


def recover(target: Path) -> None:
    """Bring back a folder that was put aside to be replaced, by a writer that was killed before the new one was there.

    Does nothing where there is something at ``target``, and on a file system that is read-only.
    """
    if not os.path.exists(target):
        with suppress(OSError, RuntimeError, ValueError):  # links in a circle; a name that no file can have
            _recover(target.resolve())


def _recover(target: Path) -> None:
    if not os.path.lexists(target):
        for aside in _hidden_entries(target, _ASIDE):
            os.rename(aside, target)
            return


def _publish(staging: Path, target: Path) -> None:
    """Let ``target`` be the new folder; the old one, if there is one, takes the place of ``staging``."""
    if not target.exists() or not any(target.iterdir()):
        os.rename(staging, target)  # replaces an empty folder, too
        return
    if exchange(staging, target):
        return
    aside = _hidden_name(target, _ASIDE)
    while True:
        os.rename(target, aside)
        try:
            os.rename(staging, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            continue  # a reader has brought the old one back
        with suppress(FileNotFoundError):  # another writer may have removed it
            os.rename(aside, staging)
        return


def _can_be_replaced(path: Path) -> bool:
    folder = Path(os.path.realpath(path.parent))
    return path.is_file() and folder != Path("/dev") and not folder.is_relative_to("/proc")


def _new_staging(target: Path, create: Callable[[Path], None]) -> tuple[Path, Lock]:
    """A hidden name for ``target`` at which something has been created, and a lock on that."""
    while True:
        staging = _hidden_name(target, _WRITING)
        create(staging)
        with suppress(FileNotFoundError):  # another writer took it for a leftover before it was locked
            lock = Lock(staging, wait=True)
            if lock.is_on(staging):
                return staging, lock
            lock.close()


def _hidden_name(target: Path, purpose: str) -> Path:
    return target.parent / f".{target.name}.{purpose}-{secrets.token_hex(4)}"


def _hidden_entries(target: Path, purpose: str) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{purpose}-[0-9a-f]{{8}}")
    return [entry for entry in target.parent.iterdir() if pattern.fullmatch(entry.name) and not entry.is_symlink()]


def _remove_leftovers(target: Path) -> None:
    """Remove what killed writers of the same target have left, once the target is there or nothing was put aside."""
    with suppress(OSError):
        for entry in (*_hidden_entries(target, _WRITING), *_hidden_entries(target, _ASIDE)):
            with Lock(entry, wait=False) as lock:
                if not lock.held:
                    continue  # another one is writing there
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink()


def _in_target(error: OSError, staging: Path, target: Path) -> Path | None:
    """The place in ``target`` that an error is about, or None where it is about a file elsewhere."""
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return target
    path = Path(os.fsdecode(error.filename))
    if path.is_relative_to(staging):
        return target / path.relative_to(staging)
    return path if path == target.parent or path.is_relative_to(target) else None
