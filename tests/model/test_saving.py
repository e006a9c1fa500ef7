"""Writing checkpoints: bit for bit, in every dialect and format, whole or not at all."""

import json
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from cpmbee.errors import CheckpointError
from cpmbee.model import CpmBee, load_model, open_checkpoint, save_checkpoint
from tests.model.factory import random_model, tiny_config, write_checkpoint, write_vocabulary

PRUNED = tiny_config(mask_modules=((False, True), (True, False), (False, False)), half=True)


def assert_same(model: CpmBee, other: CpmBee) -> None:
    assert model.config == other.config
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    for (name, parameter), (other_name, other_parameter) in pairs:
        assert name == other_name
        bits = {2: torch.int16, 4: torch.int32}[parameter.element_size()]
        assert torch.equal(parameter.view(bits), other_parameter.view(bits)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 5000])
@pytest.mark.parametrize("file_format", ["safetensors", "bin"])
@pytest.mark.parametrize("dialect", ["huggingface", "original"])
def test_round_trip(tmp_path: Path, dialect: Any, file_format: Any, max_shard_bytes: int, dtype: torch.dtype) -> None:
    model = random_model(PRUNED, dtype=dtype)
    folder = tmp_path / "new" / "model"
    save_checkpoint(model, folder, dialect, file_format, max_shard_bytes)
    assert_same(model, load_model(folder, dtype))
    files = sorted(folder.glob(f"*.{file_format}"))
    assert (len(files) > 1) == (max_shard_bytes == 5000)
    assert open_checkpoint(folder).files == files
    for file in files:
        assert file.stat().st_size < max_shard_bytes + 6000
        assert file.stat().st_mode == (folder / "config.json").stat().st_mode
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert ("dim_model" in raw) == (dialect == "original")
    assert list(tmp_path.rglob(".*")) == []


def test_a_view_is_saved_without_what_is_behind_it(tmp_path: Path) -> None:
    model = random_model()
    shape = model.input_embedding.weight.shape
    large = torch.randn(1000 * shape[0], shape[1])
    model.input_embedding.weight = torch.nn.Parameter(large[: shape[0]])
    save_checkpoint(model, tmp_path / "model", file_format="bin")
    assert (tmp_path / "model" / "pytorch_model.bin").stat().st_size < 200_000


def test_vocabulary_is_copied(tmp_path: Path) -> None:
    vocabulary = write_vocabulary(tmp_path / "words.txt")
    save_checkpoint(random_model(), tmp_path / "model", vocab_file=vocabulary)
    assert (tmp_path / "model" / "vocab.txt").read_bytes() == vocabulary.read_bytes()


def test_existing_folder_is_replaced_only_when_asked_and_a_checkpoint(tmp_path: Path) -> None:
    old, new = random_model(seed=1), random_model(seed=2)
    folder = write_checkpoint(tmp_path / "model", old)
    with pytest.raises(CheckpointError, match="already exists"):
        save_checkpoint(new, folder)
    assert_same(old, load_model(folder))
    save_checkpoint(new, folder, overwrite=True)
    assert_same(new, load_model(folder))
    other = tmp_path / "photos"
    other.mkdir()
    (other / "config.json").write_text("{}")
    (other / "1.jpg").write_text("x")
    with pytest.raises(CheckpointError, match="photos: is not a checkpoint"):
        save_checkpoint(new, other, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "photos"]


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors.old", "vocab.txt/", ".hidden"])
def test_a_checkpoint_with_a_foreign_file_is_not_replaced(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / "vocab.txt").unlink()
    if name.endswith("/"):
        (folder / name).mkdir()
    else:
        (folder / name).write_text("mine")
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError, match=f"model: holds {name.removesuffix('/')}, which is no part"):
        save_checkpoint(random_model(), folder, overwrite=True)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("no space left")])
def test_interrupted_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    old = random_model(seed=1)
    folder = write_checkpoint(tmp_path / "model", old)

    def fail(*_: object) -> None:
        raise error

    for stage in ("torch.save", "cpmbee.model.saving._write_config", "cpmbee.file_system.sync_entry"):
        with monkeypatch.context() as patch:
            patch.setattr(stage, fail)
            with pytest.raises((KeyboardInterrupt, OSError)):
                save_checkpoint(random_model(), folder, file_format="bin", overwrite=True)
            with pytest.raises((KeyboardInterrupt, OSError)):
                save_checkpoint(random_model(), tmp_path / "fresh", file_format="bin")
    assert_same(old, load_model(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_unknown_options(tmp_path: Path) -> None:
    for options in ({"dialect": "french"}, {"file_format": "zip"}, {"max_shard_bytes": 0}):
        with pytest.raises(CheckpointError, match="cannot save as"):
            save_checkpoint(random_model(), tmp_path / "model", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path, name: str) -> None:
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # of any file: less than the weights have
    try:
        with pytest.raises(CheckpointError, match=rf"model/{name}: cannot be written \(File too large\); model is"):
            save_checkpoint(random_model(), tmp_path / "model", file_format=name.rpartition(".")[2])  # type: ignore[arg-type]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
