"""Opening files that anybody may have put there: regular ones only, never a pipe or a device, which may never end."""

from __future__ import annotations

import os
import stat
from codecs import BOM_UTF8
from pathlib import Path
from typing import BinaryIO

from cpmbee.errors import CpmBeeError

_POINTER = b"version https://git-lfs.github.com/spec/"  # how a file begins that git-lfs has not fetched
_POINTER_BYTES = 1024  # such a file has less


def open_regular(path: str | Path, what: str, error_class: type[CpmBeeError]) -> BinaryIO:
    """Open a regular file, or a link to one, for reading; never waits.

    Args:
        path: the file.
        what: what it should be, for the message, such as ``the vocabulary``.
        error_class: of what is raised.

    Raises:
        CpmBeeError: as ``error_class``: the file cannot be opened, is no regular file, or is the pointer that git-lfs
            leaves in a file's place; names it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise error_class(f"{path}: cannot read {what} ({error.strerror})") from None
    except ValueError:  # a zero byte or a lone surrogate in the name
        raise error_class(f"{path}: cannot read {what} (no file can have this name)") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise error_class(f"{path}: cannot read {what} (it is {kind}, not a file)")
        if status.st_size < _POINTER_BYTES and os.pread(descriptor, len(_POINTER), 0) == _POINTER:
            raise error_class(
                f"{path}: a git-lfs pointer, not {what}; fetch the file itself: `git lfs pull` where it was cloned"
            )
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, what: str, error_class: type[CpmBeeError], limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        CpmBeeError: as `open_regular`; or the file is larger, or its disk fails.
    """
    with open_regular(path, what, error_class) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise error_class(f"{path}: cannot read {what} ({error.strerror})") from None
    if len(content) > limit:
        raise error_class(f"{path}: larger than {limit >> 20} MiB; is this {what}?")
    return content


def read_text(path: str | Path, what: str, error_class: type[CpmBeeError], limit: int) -> str:
    """The text of a regular file in UTF-8 of at most ``limit`` bytes, without a byte order mark.

    Raises:
        CpmBeeError: as `read_regular`; or the file is not UTF-8: names the line.
    """
    content = read_regular(path, what, error_class, limit).removeprefix(BOM_UTF8)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise error_class(f"{path}:{content.count(10, 0, error.start) + 1}: not UTF-8") from None
