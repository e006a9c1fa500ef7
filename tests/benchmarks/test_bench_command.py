"""`cpmbee bench` on the demo model: what it writes, and what it refuses before anything runs."""

import csv
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from cpmbee import cli
from cpmbee.bench import checks
from cpmbee.bench.peers.registry import PEERS
from cpmbee.bench.plan import Workload
from cpmbee.cache_types import CacheType
from cpmbee.config import ModelConfig
from cpmbee.errors import VocabularyError
from cpmbee.export.demo import demo_checkpoint
from cpmbee.export.exporter import export
from cpmbee.session import OrtBackend

ANSWER = 5
REQUESTS = (
    {"input": "三千零五", "prompt": "写成数字", "<ans>": "3005"},
    {"input": "3005", "prompt": "写成汉字", "<ans>": "三千零五"},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "demo-int4"
    export(demo_checkpoint(), out, "int4", method="nearest", verify=False)
    return out


def bench(*arguments: str | Path) -> int:
    quick = ("--rounds", "1", "--repetitions", "2", "--attempts", "1", "--threads", "1")
    return cli.main(["bench", *map(str, arguments), *quick])


def test_one_command_measures_everything(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests, out = tmp_path / "requests.jsonl", tmp_path / "out"
    requests.write_text("".join(json.dumps(request) + "\n" for request in REQUESTS), encoding="utf-8")
    options = ("--prompt", "32,64", "--answer", str(ANSWER), "--peers", "functions,no-such-engine", "--out", out)
    assert bench(folder, *options) == 2
    assert "no peer is called 'no-such-engine'" in capsys.readouterr().err
    options = ("--prompt", "32,64", "--answer", str(ANSWER), "--peers", "functions,ctranslate2", "--out", out)
    more = ("--quality", requests, "--checkpoint", demo_checkpoint(), "--profile", "--plot")
    assert bench(folder, *options, *more) == 0
    shown = capsys.readouterr().out
    assert (out / "table.md").read_text(encoding="utf-8") in shown
    raw = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert [cell["subject"] for cell in raw["cells"]] == ["demo-int4", "demo-int4: functions"] * 2
    config = ModelConfig.from_file(folder / "config.json")
    row = 2 * 2 * len(config.attention_layers) * config.attention_dim  # keys and values, fp16
    for cell in raw["cells"]:
        (process,) = cell["rounds"]
        assert len(process["steps"]) == 2 * (ANSWER - 1)  # all answers are equally long
        assert len(process["prefill"]) == len(process["encode"]) == len(process["decode"]) == 2
        assert process["peak_resident"] > process["peak_anonymous"] > 10_000_000
        assert process["cache_bytes"] == (cell["workload"]["prompt"] + ANSWER - 1) * row
        assert process["kernels"]["BucketedAttention"] == "function" or "functions" not in cell["subject"]
    assert raw["about"]["machine"]["flags"]
    assert raw["about"]["command"].startswith("cpmbee bench demo-int4 --prompt 32,64")
    assert raw["quality"]["demo-int4"]["accuracy"] == 1.0
    assert raw["quality"]["demo-int4"]["kl"] < 0.01
    assert raw["skipped"] == [["ctranslate2", raw["skipped"][0][1]]]
    decode = raw["profile"]["demo-int4"]["decode"]
    assert decode["QuantizedLinear"]["least_ms"] > 0
    assert raw["subjects"]["demo-int4"]["weight_bytes"] == (folder / "model.onnx.data").stat().st_size
    assert {"engine", "between", "BucketedAttention"} <= set(decode) or "MatMulNBits" in decode
    assert "QuantizedLinear" in shown
    rows = list(csv.DictReader((out / "table.csv").open(encoding="utf-8")))
    assert [row["prompt"] for row in rows] == ["32", "32", "64", "64"]
    assert (out / "decode-by-context.png").read_bytes().startswith(b"\x89PNG")
    assert bench(folder, "--out", out) == 1
    assert "there is a result already" in capsys.readouterr().err


@pytest.mark.slow
def test_every_peer_is_measured_or_its_absence_said(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--prompt", "64", "--answer", str(ANSWER), "--peers", "all", "--checkpoint", demo_checkpoint(), "--plot")
    assert bench(folder, *options, "--out", out) == 0
    raw = json.loads((out / "result.json").read_text(encoding="utf-8"))
    measured = {raw["subjects"][cell["subject"]]["engine"] for cell in raw["cells"]}
    skipped = {name for name in PEERS for label, _ in raw["skipped"] if name in label}
    assert measured | skipped == {"cpmbee", *PEERS}
    assert cli.main(["bench", "compare", str(out), str(out)]) == 0


def test_beams_and_batches(folder: Path, tmp_path: Path) -> None:
    assert bench(folder, "--prompt", "32", "--answer", "4", "--batch", "2", "--beams", "3", "--out", tmp_path) == 0
    (cell,) = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["cells"]
    assert len(cell["rounds"][0]["steps"]) == 2 * 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("vocab.txt", "vocab.txt: missing"),
        ("model.onnx.data", "model.onnx.data: missing"),
        ("engine.json", "engine.json"),
    ],
)
def test_broken_folders_are_refused_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, message: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / damage).unlink()
    assert bench(folder, broken, "--out", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    with (broken / "vocab.txt").open("a", encoding="utf-8") as file:
        file.write("one more\n")
    manifest = json.loads((broken / "engine.json").read_text(encoding="utf-8"))
    content = (broken / "vocab.txt").read_bytes()
    manifest["files"]["vocab.txt"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (broken / "engine.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(VocabularyError, match="tokens, but the model has"):
        checks.open_subjects([broken])


def test_a_model_too_large_for_memory_is_refused_first(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "physical_memory", lambda: 150_000_000)
    assert bench(folder, "--out", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert "needs about 0.2 GB of memory" in message
    assert "this machine has 0.1" in message or "this machine has 0.2" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cache", ["fp32", "fp16", "int8"])
def test_a_cache_takes_what_its_type_takes(folder: Path, tmp_path: Path, cache: CacheType) -> None:
    export(demo_checkpoint(), tmp_path / "model", "int4", method="nearest", verify=False, cache=cache)
    ((subject, opened),) = checks.open_subjects([tmp_path / "model"])
    backend = OrtBackend(opened, "cpu", 1, 100)
    assert subject.row_bytes == backend.cache_bytes / (backend.cache_rows + 1)


def test_a_peer_that_does_not_fit_memory_is_skipped_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ((ours, _),) = checks.open_subjects([folder])
    enough = ours.memory_bytes(Workload(32, 4)) + 1
    monkeypatch.setattr("cpmbee.bench.checks.physical_memory", lambda: enough)
    monkeypatch.setattr("cpmbee.bench.run.physical_memory", lambda: enough)
    assert bench(folder, "--prompt", "32", "--answer", "4", "--peers", "matmulnbits", "--out", tmp_path / "out") == 0
    raw = json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))
    assert [cell["subject"] for cell in raw["cells"]] == ["demo-int4"]
    assert "- demo-int4: matmulnbits: needs about" in capsys.readouterr().out


def test_where_nothing_can_be_written_nothing_is_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for option in ("--out", "--peer-models"):
        for place in (file, file / "below"):
            assert bench(folder, option, place) == 1
            assert f"{file}: is not a folder" in capsys.readouterr().err
    assert bench(folder, "--checkpoint", tmp_path / "none", "--out", tmp_path / "out") == 1
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_fails_after_measuring_does_not_lose_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"input": "三", "<ans>": {"wrong": 1}}\n', encoding="utf-8")
    options = ("--prompt", "32", "--answer", "4", "--quality", requests, "--checkpoint", demo_checkpoint())
    assert bench(folder, *options, "--out", tmp_path / "out") == 0
    assert "quality: " in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "result.json").read_text(encoding="utf-8"))["cells"]


def test_impossible_requests_are_refused_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(folder, "--prompt", "2") == 1
    assert "a prompt has at least" in capsys.readouterr().err
    assert bench(folder, "--prompt", "1000000") == 1
    assert "GB of memory for prompts of 1000000 tokens" in capsys.readouterr().err
    assert bench(folder, "--answer", "1") == 1
    assert "an answer has at least 2 tokens" in capsys.readouterr().err
    assert bench(folder, folder) == 1
    assert "two folders are called demo-int4" in capsys.readouterr().err
