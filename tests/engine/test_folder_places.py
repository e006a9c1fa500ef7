"""Where model folders may be: in hub caches made of links, under names that are no text; and what is none."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import pytest

import cpmbee
from cpmbee.export.exporter import export
from cpmbee.folder import open_folder
from tests.engine.graph_fuzz import put_graph

REQUEST = {"input": "今天", "<ans>": ""}


def hub_cache(folder: Path, root: Path, below: str = "") -> Path:
    """The files of a folder as a Hugging Face cache keeps them; returns the folder of links."""
    blobs = root / "models--someone--bee" / "blobs"
    snapshot = root / "models--someone--bee" / "snapshots" / "0123abc" / below
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.mark.parametrize("below", ["", "int8"])
@pytest.mark.parametrize("native", [True, False])
def test_a_hub_cache_answers_as_the_folder_does(small_folder: Path, tmp_path: Path, below: str, native: bool) -> None:
    snapshot = hub_cache(small_folder, tmp_path, below)
    there = cpmbee.Engine.from_pretrained(snapshot, num_threads=1, verify_hashes=True, native=native)
    here = cpmbee.Engine.from_pretrained(small_folder, num_threads=1, native=native)
    assert there.generate(REQUEST).answer == here.generate(REQUEST).answer


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_of_a_hub_cache_are_mapped_not_copied(small_folder: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(small_folder, tmp_path)
    engine = cpmbee.Engine.from_pretrained(snapshot, num_threads=1)
    maps = Path("/proc/self/maps").read_text(errors="replace")
    assert os.fspath((snapshot / "model.onnx.data").resolve()) in maps
    del engine


@pytest.mark.parametrize("name", ["model.onnx.data", "vocab.txt", "generation_config.json"])
@pytest.mark.parametrize("elsewhere", ["secret", "blobs/secret", "models--someone--bee/secret"])
def test_a_link_out_of_a_hub_cache(small_folder: Path, tmp_path: Path, name: str, elsewhere: str) -> None:
    snapshot = hub_cache(small_folder, tmp_path)
    target = tmp_path / elsewhere
    target.parent.mkdir(exist_ok=True)
    shutil.move((snapshot / name).resolve(), target)
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(target)
    with pytest.raises(cpmbee.ModelFolderError, match=rf"{name}: a link that leads out of the folder"):
        open_folder(snapshot)


def test_files_of_a_hub_cache_are_hashed(small_folder: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(small_folder, tmp_path)
    blob = (snapshot / "vocab.txt").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(cpmbee.ModelFolderError, match=r"vocab\.txt: altered"):
        open_folder(snapshot)


def test_a_blob_that_is_a_pipe(small_folder: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(small_folder, tmp_path)
    blob = (snapshot / "vocab.txt").resolve()
    blob.unlink()
    os.mkfifo(blob)
    with pytest.raises(cpmbee.ModelFolderError, match=r"vocab\.txt: not a regular file"):
        open_folder(snapshot)


@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere take no such name")
def test_a_path_that_is_no_utf8(small_checkpoint: Path, small_folder: Path, tmp_path: Path) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/" + "模型".encode("gbk"))
    shutil.copytree(small_folder, folder)
    with pytest.raises(cpmbee.ModelFolderError, match="this path is not UTF-8") as caught:
        open_folder(folder)
    assert str(caught.value).encode()
    with pytest.raises(cpmbee.ModelFolderError, match="this path is not UTF-8"):
        export(small_checkpoint, f"{folder}-2", verify=False)
    assert sorted(os.listdir(os.fsencode(tmp_path))) == [os.path.basename(os.fsencode(folder))]


def test_a_checkpoint_says_so(small_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(cpmbee.ModelFolderError, match=r"this is a checkpoint, not a model folder; run cpmbee export"):
        open_folder(small_checkpoint)
    weights = next(path for path in small_checkpoint.iterdir() if path.suffix in (".bin", ".safetensors"))
    with pytest.raises(cpmbee.ModelFolderError, match="this is a checkpoint, not a model folder; run cpmbee export"):
        open_folder(weights)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(cpmbee.ModelFolderError, match="a file, not a model folder"):
        open_folder(tmp_path / "notes.txt")
    with pytest.raises(cpmbee.ModelFolderError, match=r"engine\.json: cannot read"):
        open_folder(tmp_path)


def test_a_graph_name_that_is_no_utf8(small_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small_folder, tmp_path / "model"))
    put_graph(copy, (copy / "model.onnx").read_bytes().replace(b"ext_subs", b"ext\xff\xfe\x80\x81s"))
    with pytest.raises(cpmbee.ModelFolderError, match="a name is not UTF-8"):
        open_folder(copy)
