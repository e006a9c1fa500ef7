"""What a command may write to: never to what it reads, and in place of a folder only where all of that is its own.

Every command that is told where to write asks here, before it does anything else: `require_apart` for its files and
folders, `require_replaceable` for folders.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from cpmbee.errors import ConfigError, CpmBeeError

_STANDARD_INPUT = "/dev/stdin"  # leads to the file that it comes from, where it comes from one


@dataclass(frozen=True)
class FolderKind:
    """What one kind of writer makes, told from all other folders.

    Attributes:
        name: with its article, for messages.
        files: matches the names of all files that such a folder can have; it has no folders in it.
        check: raises `CpmBeeError` where a folder is none of the kind.
    """

    name: str
    files: re.Pattern[str]
    check: Callable[[Path], object]


def require_replaceable(target: Path, kind: FolderKind, overwrite: bool, error: type[CpmBeeError]) -> None:
    """Refuse a place for a new folder where something is that must not be lost.

    Args:
        target: where the folder shall be: free, an empty folder, or, with ``overwrite``, one of the kind.
        kind: of the folder that shall be there.
        overwrite: whether the user has asked to replace what is there.
        error: raised where that must not be.

    Raises:
        CpmBeeError: as ``error``: names what is in the way.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise error(f"{target}: is a file; name a folder that does not exist yet")
    entries = sorted(target.iterdir())
    if not entries:
        return
    if not overwrite:
        raise error(f"{target}: already exists; choose another folder, or overwrite it (--overwrite)")
    try:
        kind.check(target)
    except CpmBeeError:
        raise error(f"{target}: is not {kind.name}, so it is not overwritten") from None
    for entry in entries:
        if not (kind.files.fullmatch(entry.name) and entry.is_file()):
            raise error(f"{target}: holds {entry.name}, which is no part of {kind.name}, so it is not overwritten")


def require_apart(
    outputs: Iterable[str | Path | None],
    inputs: Iterable[str | Path | None],
    error: type[CpmBeeError] = ConfigError,
) -> None:
    """Refuse to write to what is read, whatever path or link it is called by, or twice to one place.

    Args:
        outputs: files that will be written, and folders that will be replaced; None are skipped.
        inputs: files and folders that are read, ``-`` for standard input; None, and what is not there, are skipped.
        error: raised where one of the former is one of the latter, a file in it, or a folder that holds it.

    Raises:
        CpmBeeError: as ``error``: names both.
    """
    given = [Path(_STANDARD_INPUT if path == "-" else path) for path in inputs if path is not None]
    wanted = [Path(path) for path in outputs if path is not None]
    for one, other in combinations(wanted, 2):
        if os.path.realpath(one) == os.path.realpath(other):
            raise error(f"{one}: is written to twice; give {other} another name")
    for output in filter(os.path.exists, wanted):
        for path in filter(os.path.exists, given):
            if relation := _relation(output, path):
                raise error(f"{output}: {relation} {path}, which is read; write to another place")


def with_folders(inputs: Iterable[str | Path | None]) -> Iterator[str | Path | None]:
    """Inputs, and the folders of those that are files: a weight file's configuration and vocabulary lie beside it."""
    for path in inputs:
        yield path
        if path is not None and Path(path).is_file():
            yield Path(path).parent


def _relation(output: Path, given: Path) -> str:
    """What an output has to do with an input, both there; empty where that is nothing."""
    if output.samefile(given):
        return "is the same as"
    if output.is_dir():
        return "holds" if any(output.samefile(folder) for folder in given.resolve().parents) else ""
    if given.is_dir() and any(output.samefile(file) for file in given.iterdir() if file.exists()):
        return "is a file of"
    return ""
