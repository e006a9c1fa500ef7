"""Generation options: NumPy's numbers, numbers that nobody can write out, and defaults that belong to the user."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cpmbee
from cpmbee.errors import ConfigError
from cpmbee.export import cli
from cpmbee.export.exporter import export
from cpmbee.folder import open_folder
from cpmbee.generation_config import GenerationConfig


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint32])
@pytest.mark.parametrize("name", ["beam_size", "max_new_tokens", "repetition_window", "top_k", "seed"])
def test_integers_of_numpy(name: str, kind: Any) -> None:
    value = getattr(GenerationConfig(**{name: kind(5)}), name)
    assert value == 5
    assert type(value) is int


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", ["repetition_penalty", "temperature", "top_p"])
def test_floats_of_numpy(name: str, kind: Any) -> None:
    config = GenerationConfig().updated(**{name: kind(0.5)})
    assert type(getattr(config, name)) is float
    assert json.loads(json.dumps(config.to_dict()))[name] == 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": np.float32(5)},
        {"max_new_tokens": np.bool_(True)},
        {"beam_size": True},
        {"temperature": np.float32("nan")},
        {"temperature": np.bool_(True)},
        {"seed": np.int64(-1)},
        {"top_k": np.array([5])},
    ],
)
def test_what_is_no_number_of_its_kind(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} must be"):
        GenerationConfig(**options)


@pytest.mark.parametrize("name", ["max_new_tokens", "top_p", "temperature", "seed"])
@pytest.mark.parametrize(
    "value",
    [10**5000, -(10**5000), [10**5000], "x" * 10_000, {"a": ["b" * 999]}],
    ids=("huge", "negative", "list", "text", "dict"),
)
def test_values_are_shown_in_short(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be") as caught:
        GenerationConfig(**{name: value})
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", ["num_threads", "cache_tokens"])
def test_values_of_the_engine_are_shown_in_short(name: str, small_folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{name} must be an integer .*<integer of 16610 bits>"):
        cpmbee.Engine.from_pretrained(small_folder, **{name: 10**5000})


def test_numbers_of_numpy_for_the_engine(small_folder: Path) -> None:
    engine = cpmbee.Engine.from_pretrained(small_folder, num_threads=np.int64(1), cache_tokens=np.int32(99))
    assert engine.cache_usage.capacity == 99


@pytest.mark.parametrize("name", ["self", "cls", "options", "x" * 999, ""])
def test_names_that_are_no_options(name: str, tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({name: 1}))
    with pytest.raises(ConfigError, match="unknown generation option"):
        GenerationConfig.from_file(path)
    with pytest.raises(ConfigError, match="unknown generation option"):
        GenerationConfig().updated(**{name: 1})


def test_defaults_belong_to_the_user(small_folder: Path, tmp_path: Path) -> None:
    """Whatever hash the manifest has; but they are checked."""
    folder = Path(shutil.copytree(small_folder, tmp_path / "model"))
    (folder / "generation_config.json").write_text('{"max_new_tokens": 2,\n "temperature": 0.5, "seed": null}\n')
    assert open_folder(folder, verify_hashes=True).generation_config == GenerationConfig(
        max_new_tokens=2, temperature=0.5
    )
    engine = cpmbee.Engine.from_pretrained(folder, num_threads=1)
    assert engine.generate({"input": "a", "<ans>": ""}).usage.completion_tokens <= 2
    (folder / "generation_config.json").write_text('{"max_new_tokens": 0}')
    with pytest.raises(ConfigError, match=r"generation_config\.json: max_new_tokens must be an integer from 1"):
        open_folder(folder)
    (folder / "generation_config.json").unlink()
    with pytest.raises(cpmbee.ModelFolderError, match=r"generation_config\.json: missing"):
        open_folder(folder)


def test_export_writes_defaults(small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-new-tokens", "7", "--temperature", "0.5", "--top-k", "3", "--repetition-penalty", "1.1"]
    assert cli.export_main([str(small_checkpoint), str(tmp_path / "cli"), "--no-verify", *options]) == 0
    wanted = GenerationConfig(max_new_tokens=7, temperature=0.5, top_k=3, repetition_penalty=1.1)
    assert open_folder(tmp_path / "cli").generation_config == wanted
    export(small_checkpoint, tmp_path / "python", generation_config=wanted, verify=False)
    assert open_folder(tmp_path / "python").generation_config == wanted
    with pytest.raises(SystemExit) as ended:
        cli.export_main([str(small_checkpoint), str(tmp_path / "bad"), "--beam-size", "4", "--top-k", "3"])
    assert ended.value.code == 2
    assert "beam_size 4 does not combine with sampling" in capsys.readouterr().err


def test_verification_does_not_sample(small_checkpoint: Path, tmp_path: Path) -> None:
    """It searches, greedily and with beams, whatever the folder's own defaults are."""
    defaults = GenerationConfig(temperature=1.5, repetition_penalty=2.0)
    report = export(small_checkpoint, tmp_path / "model", generation_config=defaults)
    assert report.verification is not None
    assert report.verification.passed
