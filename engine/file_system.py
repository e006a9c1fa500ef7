"""What this package asks of a file system beyond Python's own functions: exchange, locks, and forcing to the disk."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_CURRENT_FOLDER = -100  # AT_FDCWD of Linux: paths count from the current folder
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2, RENAME_SWAP of macOS's renamex_np
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def exchange(one: Path, other: Path) -> bool:
    """Let two names that exist, on one file system, stand for what the other stood for, in a single step.

    Returns:
        False where the system or the file system cannot do that; nothing has changed then.

    Raises:
        OSError: the file system refuses for another reason.
    """
    rename = _exchanging_rename()
    if rename is None:
        return False
    if rename(os.fsencode(one), os.fsencode(other)) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@functools.cache
def _exchanging_rename() -> Callable[[bytes, bytes], int] | None:
    """The system's function, which gives 0 when it is done, or None."""
    library = ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            swap = library.renamex_np
            swap.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint]
            return lambda one, other: int(swap(one, other, _EXCHANGE))
        rename = library.renameat2
    except AttributeError:  # an old C library, or another system
        return None
    rename.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return lambda one, other: int(rename(_CURRENT_FOLDER, one, _CURRENT_FOLDER, other, _EXCHANGE))


class Lock:
    """A lock on a file or folder, held until `close`, or until the process ends in whatever way.

    Args:
        path: of what is there.
        wait: until nobody else holds it.

    Attributes:
        held: false where somebody else holds it, and where the file system knows no locks.

    Raises:
        OSError: there is nothing at ``path``, or it cannot be opened.
    """

    held = False

    def __init__(self, path: Path, *, wait: bool) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO does not make it wait
        with suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            self.held = True

    def is_on(self, path: Path) -> bool:
        """Whether what is at ``path`` now is what was locked.

        Raises:
            FileNotFoundError: there is nothing.
        """
        return os.path.samestat(os.fstat(self._descriptor), path.stat())

    def close(self) -> None:
        """Let others have it."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            self.close()


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
