"""No command replaces or deletes what it was not told to: every command, with outputs that must be refused."""

import json
import os
from pathlib import Path

import pytest

from cpmbee import outputs
from cpmbee.cli import main
from cpmbee.errors import ConfigError
from cpmbee.export import export
from cpmbee.model.lora_saving import save_lora
from cpmbee.train.data.build import build_dataset
from cpmbee.train.lora import LoraConfig, add_adapters, delta_of
from tests.model.factory import random_model, write_checkpoint

TRAINING = "--steps 1 --threads 1 --row-length 64 --batch-rows 1"

# What a command is called with, and what its one line has to name. Where names are links, they lead to the others.
REFUSED = {
    # a command's own inputs
    "export base base --overwrite": "base",
    "export base/model.safetensors base --overwrite --no-verify": "base",
    "export base ./link --overwrite": "base",
    "export base model --overwrite --quality model/notes.jsonl": "notes.jsonl",
    "merge base delta base --overwrite": "base",
    "merge link delta base --overwrite": "link",
    "merge base/model.safetensors delta base --overwrite": "model.safetensors",
    "merge base delta/pytorch_model.bin delta --overwrite": "pytorch_model.bin",
    "data build data data --overwrite": "data",
    "data build data_link data --overwrite": "data_link",
    "data build texts/text.txt texts --overwrite": "text.txt",
    "eval model records.jsonl --output records.jsonl": "records.jsonl",
    "eval model records.jsonl --predictions linked.jsonl": "linked.jsonl",
    "eval model records.jsonl --predictions hard.jsonl": "hard.jsonl",
    "eval model records.jsonl --predictions model/vocab.txt": "vocab.txt",
    "eval base/model.safetensors records.jsonl --output base/config.json": "config.json",
    "eval model data --output data/manifest.json": "manifest.json",
    "eval model records.jsonl --examples other.jsonl --output other.jsonl": "other.jsonl",
    "eval model records.jsonl --output new.json --predictions ./new.json": "new.json",
    "generate model records.jsonl --output records.jsonl": "records.jsonl",
    "generate model records.jsonl --output hard.jsonl": "hard.jsonl",
    "generate model records.jsonl --examples other.jsonl --output ./other.jsonl": "other.jsonl",
    "generate model records.jsonl --output model/engine.json": "engine.json",
    f"finetune run/model records.jsonl run {TRAINING}": "run/model",
    f"finetune base records.jsonl base {TRAINING}": "base",
    f"finetune base run/report.json run {TRAINING}": "report.json",
    f"finetune base records.jsonl run --lora run/delta {TRAINING} --resume": "delta",
    f"finetune base records.jsonl run --lora run/adapter/adapter_model.safetensors {TRAINING} --resume": "adapter",
    "pretrain own.json run": "run/model",
    "pretrain own.json run --resume": "run/model",
    # what is somebody else's, or was not to be replaced
    "export base model": "model",
    "export base photos --overwrite": "photos",
    "export base data --overwrite": "data",
    "export base records.jsonl --overwrite": "records.jsonl",
    "merge base delta model --overwrite": "model",
    "merge base delta photos --overwrite": "photos",
    "merge base delta delta_2 --overwrite": "delta_2",
    "merge base delta base_2": "base_2",
    "merge base delta noted --overwrite": "notes.txt",
    "data build other.jsonl photos --overwrite": "photos",
    "data build other.jsonl data": "data",
    f"finetune base records.jsonl run {TRAINING}": "run/model",
    f"finetune base records.jsonl adapters {TRAINING} --lora-rank 1": "adapters/adapter",
    f"finetune base records.jsonl reported {TRAINING}": "reported/report.json",
    f"finetune base records.jsonl measured {TRAINING}": "measured/metrics.jsonl",
    f"finetune base records.jsonl photographed {TRAINING} --resume": "photographed/model",
    "pretrain other.json run": "run/model",
    "pretrain other.json measured": "measured/metrics.jsonl",
    "bench model --out tables": "table.md",
    "demo --out model": "model",
    "demo --out photos --overwrite": "photos",
}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with something of every kind."""
    root = tmp_path_factory.mktemp("everything")
    for name in ("base", "base_2", "noted", "run/model"):
        write_checkpoint(root / name)
    (root / "noted" / "notes.txt").write_text("mine")
    export(root / "base", root / "model", verify=False)
    adapted = random_model()
    add_adapters(adapted, LoraConfig(2), 0)
    for name in ("delta", "delta_2", "run/delta"):
        save_lora(delta_of(adapted), root / name)
    for name in ("run/adapter", "adapters/adapter"):
        save_lora(delta_of(adapted), root / name, "peft")
    for name in ("records.jsonl", "other.jsonl", "texts/text.txt", "run/report.json", "model/notes.jsonl"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(json.dumps({"input": "a", "<ans>": "b"}) + "\n")
    for name in ("photos/config.json", "photographed/model/config.json", "photographed/model/1.jpg", "photos/1.jpg"):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text("{}")
    for name in ("reported/report.json", "measured/metrics.jsonl", "tables/table.md"):
        (root / name).parent.mkdir()
        (root / name).write_text('{"step": 1}\n')
    build_dataset(root / "records.jsonl", root / "data")
    (root / "link").symlink_to("base")
    (root / "data_link").symlink_to(root / "data")
    (root / "linked.jsonl").symlink_to("records.jsonl")
    os.link(root / "records.jsonl", root / "hard.jsonl")
    (root / "mixture.json").write_text('[{"dataset": "data"}]')
    for name, model in (("own", "run/model"), ("other", "base")):
        config = {
            "model": model,
            "data": {"mixture": "mixture.json", "row_length": 64, "batch_rows": 1},
            "training": {"steps": 1},
        }
        (root / f"{name}.json").write_text(json.dumps(config))
    return root


def contents(root: Path) -> dict[str, bytes | str]:
    """Everything in a folder, links as links."""
    found: dict[str, bytes | str] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        found[name] = os.readlink(path) if path.is_symlink() else "" if path.is_dir() else path.read_bytes()
    return found


@pytest.mark.parametrize("command", REFUSED)
def test_refused_in_one_line_and_nothing_touched(
    everything: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(everything)
    before = contents(everything)
    assert main(command.split()) == 1
    assert contents(everything) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert REFUSED[command] in line


def test_new_names_and_old_results_are_free(everything: Path) -> None:
    """A new file beside what is read, and one that an earlier run of the command has written."""
    records = everything / "records.jsonl"
    outputs.require_apart(
        [everything / "model" / "new.json", everything / "other.json"], [everything / "model", records]
    )
    outputs.require_apart([everything / "base" / "exported"], [everything / "base"])
    outputs.require_apart([records], ['{"input": "' + "a" * 5000 + '", "<ans>": ""}', "\0", None])


def test_standard_input_is_an_input(everything: Path) -> None:
    if not Path("/dev/stdin").exists():
        pytest.skip("this system does not say where standard input comes from")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(everything / "records.jsonl", os.O_RDONLY), 0)
            outputs.require_apart([everything / "other.jsonl"], ["-"])
            outputs.require_apart([everything / "hard.jsonl"], ["-"])
        except ConfigError as error:
            code = 7 if "hard.jsonl: is the same as" in str(error) else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
