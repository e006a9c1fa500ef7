import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from cpmbee import Engine
from cpmbee.cli import main
from cpmbee.errors import CheckpointError, ConfigError
from cpmbee.model import load_model
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.data.build import build_dataset
from cpmbee.train.metrics import read_metrics
from cpmbee.train.pretrain import pretrain
from cpmbee.train.pretrain_config import PretrainConfig
from cpmbee.train.torch_backend import TorchBackend
from tests.train.training_runs import TOKENS

MODEL = {
    "hidden_size": 32,
    "num_attention_heads": 2,
    "dim_head": 16,
    "dim_ff": 48,
    "num_hidden_layers": 2,
    "position_bias_num_buckets": 32,
    "position_bias_num_segment_buckets": 256,
}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A configuration that learns the last of two letters, with everything it names."""
    lines = [json.dumps({"last": f"{a}{b}", "<ans>": b}) for a in "abcd" for b in "abcd"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    build_dataset(tmp_path / "pairs.jsonl", tmp_path / "pairs")
    (tmp_path / "mixture.json").write_text('[{"dataset": "pairs"}]', encoding="utf-8")
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in TOKENS), encoding="utf-8")
    config = {
        "model": MODEL,
        "vocabulary": "vocab.txt",
        "data": {"mixture": "mixture.json", "row_length": 40, "batch_rows": 8},
        "evaluation": {"mixture": "mixture.json", "batches": 2},
        "training": {"steps": 12, "warmup": 4, "evaluate_every": 4, "checkpoint_every": 4},
        "threads": 1,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return file


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def test_the_command_trains_resumes_and_writes_a_checkpoint(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["pretrain", str(config_file), "--set", "training.schedule=constant"]
    assert main([*command, str(whole)]) == 0
    assert f"{whole / 'model'}: 12 steps" in capsys.readouterr().out
    assert main([*command, str(parts), "--set", "training.steps=4"]) == 0
    assert main([*command, str(parts)]) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert main([*command, str(parts), "--resume"]) == 0
    assert losses(parts) == losses(whole)
    weights, same = (load_model(folder / "model").state_dict() for folder in (whole, parts))
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert (whole / "model" / "vocab.txt").read_bytes() == (tmp_path / "vocab.txt").read_bytes()


def test_training_goes_on_from_a_checkpoint(config_file: Path, tmp_path: Path) -> None:
    pretrain(PretrainConfig.read(config_file, ["training.steps=60", "training.learning_rate=0.02"]), tmp_path / "a")
    model = load_model(tmp_path / "a" / "model")
    tokenizer = Tokenizer.from_file(tmp_path / "a" / "model" / "vocab.txt")
    requests = [{"last": pair, "<ans>": ""} for pair in ("ab", "cd", "dd")]
    answers = Engine(TorchBackend(model), tokenizer).generate(requests, beam_size=1, max_new_tokens=3)
    assert [result.answer for result in answers] == ["b", "d", "d"]

    raw = json.loads(config_file.read_text())
    del raw["vocabulary"]
    config_file.write_text(json.dumps({**raw, "model": "a/model"}))
    result = pretrain(PretrainConfig.read(config_file, ["training.learning_rate=0.0001"]), tmp_path / "b")
    assert result.losses[0] < 0.5 * losses(tmp_path / "a")[0]


def test_what_cannot_go_together(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size 3 is less than the vocabulary's"):
        pretrain(PretrainConfig.read(config_file, ["model.vocab_size=3"]), tmp_path / "x")
    pretrain(PretrainConfig.read(config_file, ["training.steps=1"]), tmp_path / "x")
    with pytest.raises(CheckpointError, match="batch_rows 8, this run has 9"):
        pretrain(PretrainConfig.read(config_file, ["data.batch_rows=9"]), tmp_path / "x", resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("modle={}", "no field modle"),
        ("model=3", "model must be the path of a checkpoint"),
        ("vocabulary=null", "a new model needs a vocabulary"),
        ("data=[]", "data must be an object with mixture, row_length, batch_rows"),
        ("data.rows=3", "no field data.rows"),
        ("data.row_length=0", "data.row_length must be an integer from 1"),
        ("data.mixture=3", "data.mixture must be a path"),
        ("evaluation.batches=true", "evaluation.batches must be an integer"),
        ("training=[]", "training must be an object"),
        ("training.lr=1", "no option 'lr'"),
        ("training={\"steps\": 3}", "evaluate_every must be given"),
        ("seed=-1", "seed must be an integer from 0"),
        ("seed.a.b=1", "seed is not an object"),
        ("seed", "is no change of the configuration"),
    ],
)  # fmt: skip
def test_wrong_configurations(config_file: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PretrainConfig.read(config_file, ["seed=0", change])


def test_a_configuration_that_is_no_json(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("[1")
    options: list[Any] = [file, tmp_path / "none.json"]
    for path, message in zip(options, ("not JSON", "cannot read"), strict=True):
        with pytest.raises(ConfigError, match=message):
            PretrainConfig.read(path)


def test_checkpoints_are_kept_unless_nobody_wants_them(config_file: Path) -> None:
    assert (
        PretrainConfig.read(config_file, ['training={"steps": 5000, "evaluate_every": 9}']).training.checkpoint_every
        == 1000
    )
    assert PretrainConfig.read(config_file, ["training.checkpoint_every=0"]).training.checkpoint_every == 0


def test_the_documented_configuration_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (example,) = (block for block in re.findall(r"```json\n(.*?)```", page, re.DOTALL) if '"training"' in block)
    file = tmp_path / "config.json"
    file.write_text(example, encoding="utf-8")
    config = PretrainConfig.read(file)
    assert config.mixture == tmp_path / "mixture.json"
    assert config.model_config(100).num_hidden_layers == 12
    fields = set(re.findall(r"^\| `(\w+)`", page.partition("## Pre-training")[2], re.MULTILINE))
    assert fields == set(json.loads(example))
