"""Models that are made once: whole ones, of the origin that is asked for, and nothing of the user's."""

from pathlib import Path

import pytest

from cpmbee.bench.made import code_identity, made_once


def whole(out: Path) -> None:
    out.mkdir()
    (out / "all").touch()


def interrupted(out: Path) -> None:
    out.mkdir()
    (out / "half").touch()
    raise KeyboardInterrupt


def unasked(out: Path) -> None:
    raise AssertionError(out)


def test_what_was_interrupted_is_made_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        made_once(tmp_path / "peer", {}, interrupted)
    assert not (tmp_path / "peer").exists()
    made = made_once(tmp_path / "peer", {}, whole)
    assert [file.name for file in made.iterdir()] == ["all"]
    assert made_once(made, {}, unasked) == made


def test_another_origin_is_made_again(tmp_path: Path) -> None:
    made_once(tmp_path / "peer", {"a": 1}, whole)
    with pytest.raises(KeyboardInterrupt):
        made_once(tmp_path / "peer", {"a": 2}, interrupted)
    made_once(tmp_path / "peer", {"a": 1}, whole)  # the old one is gone: its place was needed
    assert made_once(tmp_path / "peer", {"a": 1}, unasked).is_dir()


def test_files_are_made_like_folders(tmp_path: Path) -> None:
    for text in ("one", "two", "two"):
        made = made_once(tmp_path / "below" / "file", {"text": text}, lambda out, text=text: out.write_text(text))
        assert made.read_text() == text
    assert sorted(file.name for file in (tmp_path / "below").iterdir()) == ["file", "file.origin.json"]


def test_what_was_not_made_here_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "mine").touch()
    with pytest.raises(FileExistsError, match="was not made by cpmbee bench"):
        made_once(tmp_path / "peer", {}, unasked)
    assert (tmp_path / "peer" / "mine").exists()


def test_code_is_told_by_its_source() -> None:
    package, module = code_identity("cpmbee.export"), code_identity("cpmbee.bench.peers.gguf")
    assert package["versions"] == module["versions"]
    assert package["code"] != module["code"]
    assert module == code_identity("cpmbee.bench.peers.gguf")
    with pytest.raises(ModuleNotFoundError):
        code_identity("cpmbee.no_such_module")
