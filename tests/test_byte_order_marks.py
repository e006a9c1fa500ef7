"""Files that an editor began with a byte order mark are read as if it were not there."""

from __future__ import annotations

import hashlib
import json
import shutil
from codecs import BOM_UTF8
from pathlib import Path

import pytest

import cpmbee
from cpmbee.export.transcripts import read_requests
from cpmbee.model import open_checkpoint, save_checkpoint
from cpmbee.train.data import Dataset, build_dataset, open_dataset
from cpmbee.train.data.mixture import MixtureText, parse_mixture
from cpmbee.train.jsonl import open_records
from tests.model.factory import random_model
from tests.train.data.cases import write_dataset

RECORDS = [{"input": "今天", "<ans>": "好"}, {"input": "b", "<ans>": "c"}]


def mark(file: Path) -> None:
    file.write_bytes(BOM_UTF8 + file.read_bytes())


def test_an_exported_model(small_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "marked"
    shutil.copytree(small_folder, folder)
    manifest = json.loads((folder / "engine.json").read_text(encoding="utf-8"))
    for name in ("config.json", "vocab.txt", "generation_config.json"):
        mark(folder / name)
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "engine.json").write_text(json.dumps(manifest), encoding="utf-8")
    mark(folder / "engine.json")
    answers = [
        cpmbee.Engine.from_pretrained(path, num_threads=1).generate(RECORDS[0], max_new_tokens=5).answer
        for path in (small_folder, folder)
    ]
    assert answers[0] == answers[1]


def test_a_checkpoint_of_several_files(tmp_path: Path) -> None:
    save_checkpoint(random_model(), tmp_path / "model", max_shard_bytes=5000)
    expected = open_checkpoint(tmp_path / "model")
    for name in ("config.json", "model.safetensors.index.json"):
        mark(tmp_path / "model" / name)
    marked = open_checkpoint(tmp_path / "model")
    assert (marked.config, marked.names()) == (expected.config, expected.names())


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_a_data_set_and_what_it_is_built_from(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / f"in{suffix}"
    lines = map(json.dumps, RECORDS) if suffix == ".jsonl" else ("今天", "天气")
    source.write_text("\n".join(lines), encoding="utf-8")
    build_dataset(source, tmp_path / "plain")
    mark(source)
    build_dataset(source, tmp_path / "marked")
    mark(tmp_path / "marked" / "manifest.json")
    assert list(open_dataset(tmp_path / "marked")) == list(Dataset(tmp_path / "plain"))


def test_records_requests_and_mixtures(tmp_path: Path) -> None:
    lines = tmp_path / "records.jsonl"
    lines.write_text("\n".join(map(json.dumps, RECORDS)), encoding="utf-8")
    mark(lines)
    assert list(open_records(lines)) == RECORDS
    assert read_requests(lines) == RECORDS
    write_dataset(tmp_path / "data", RECORDS)
    (tmp_path / "transforms.py").write_text("def transform(data, num_samples, rng): return data\n", encoding="utf-8")
    (tmp_path / "mix.json").write_text('[{"dataset": "data", "transforms": "transforms.py"}]', encoding="utf-8")
    for name in ("transforms.py", "mix.json"):
        mark(tmp_path / name)
    mixture = parse_mixture(MixtureText.read(tmp_path / "mix.json"))
    assert [entry.key for entry in mixture.entries] == ["data:data"]
