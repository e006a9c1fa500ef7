"""Fine-tuning: it learns, keeps the best, goes on where it was killed, and says what it did."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpmbee.cli import main
from cpmbee.errors import CheckpointError, ConfigError, DataError
from cpmbee.model import load_model, open_checkpoint, read_lora
from cpmbee.model.lora import LoraDelta, LoraFactors
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.finetune import FinetuneConfig, finetune
from cpmbee.train.jsonl import open_records
from cpmbee.train.lora import LoraConfig
from cpmbee.train.metrics import StepMetrics, read_metrics
from cpmbee.train.options import TrainerConfig
from cpmbee.train.task_samples import TaskSamples
from cpmbee.train.tasks import TaskFields
from tests.model.factory import write_checkpoint
from tests.train.task_files import choice_records, copy_records, write_records

KILLED_AT_STEP_8 = """
import os, signal, sys
from cpmbee.cli import main
from cpmbee.train.trainer import OptimizerStep
take = OptimizerStep.__call__
def take_or_die(step, *arguments):
    result = take(step, *arguments)
    step.taken = getattr(step, "taken", 0) + 1
    if step.taken == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
OptimizerStep.__call__ = take_or_die
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("finetune") / "base")


@pytest.fixture(scope="module")
def data(base: Path) -> Path:
    return write_records(base.parent / "copy.jsonl", copy_records(40))


@pytest.fixture(scope="module")
def held_out(base: Path) -> Path:
    return write_records(base.parent / "held_out.jsonl", copy_records(7, seed=1))


def settings(steps: int = 12, lora: LoraConfig | None = None, **options: Any) -> FinetuneConfig:
    trainer = TrainerConfig(steps, 0.03, warmup=2, evaluate_every=4)
    return FinetuneConfig(trainer=trainer, lora=lora, row_length=64, batch_rows=4, **options)


def test_full(base: Path, data: Path, held_out: Path, tmp_path: Path) -> None:
    report = finetune(base, data, tmp_path / "out", settings(20), held_out=held_out)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["metric"] == "loss"
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if "learning_rate" in line]
    assert losses[-1] < 0.6 * losses[0]
    assert report["memory"]["trainable"] == report["memory"]["parameters"]
    assert report["memory"]["peak_resident_bytes"] > 1e7
    model = open_checkpoint(tmp_path / "out" / "model")
    assert model.vocab_file is not None
    before = load_model(base).state_dict()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in load_model(model.path).state_dict().items())


def test_the_best_evaluation_is_kept(base: Path, tmp_path: Path) -> None:
    """What is learned is wrong for the held-out record, and more so with every step: the best is not the last."""
    data, held_out = tmp_path / "data.jsonl", tmp_path / "held_out.jsonl"
    for file, answer in ((data, "a"), (held_out, "天")):
        file.write_text(json.dumps({"input": "今天", "<ans>": answer}) + "\n", encoding="utf-8")
    config = FinetuneConfig(TrainerConfig(12, 0.02, warmup=0, schedule="constant", evaluate_every=4), row_length=64)
    report = finetune(base, data, tmp_path / "out", config, held_out=held_out)
    assert report["best_step"] < report["steps"]
    assert main(["eval", str(tmp_path / "out" / "model"), str(held_out), "--output", str(tmp_path / "e.json")]) == 0
    found = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    assert found["loss"] == pytest.approx(report["best_value"], rel=1e-4)


@pytest.mark.parametrize("lora", [None, LoraConfig(2, 4.0, ("project_q", "w_1"), dropout=0.1)], ids=["full", "lora"])
def test_resumed_equals_uninterrupted(
    base: Path, data: Path, held_out: Path, tmp_path: Path, lora: LoraConfig | None
) -> None:
    whole = finetune(base, data, tmp_path / "whole", settings(12, lora), held_out=held_out)

    class KilledError(Exception):
        pass

    def kill(metrics: Any, steps: int) -> None:
        if metrics.step == 10:
            raise KilledError

    with pytest.raises(KilledError):
        finetune(base, data, tmp_path / "parts", settings(12, lora), held_out=held_out, on_step=kill)
    with pytest.raises(CheckpointError, match="holds a run already"):
        finetune(base, data, tmp_path / "parts", settings(12, lora), held_out=held_out)
    resumed = finetune(base, data, tmp_path / "parts", settings(12, lora), held_out=held_out, resume=True)
    for name in ("steps", "tokens", "last_loss", "best_step", "best_value"):
        assert resumed[name] == whole[name], name
    if lora is None:
        states = [load_model(tmp_path / run / "model").state_dict() for run in ("whole", "parts")]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    else:
        deltas = [read_lora(tmp_path / run / "delta").factors for run in ("whole", "parts")]
        assert all(np.array_equal(deltas[0][name].b, deltas[1][name].b) for name in deltas[0])


def test_the_command_killed_and_resumed_equals_one_that_was_not(
    base: Path, data: Path, held_out: Path, tmp_path: Path
) -> None:
    def arguments(out: str) -> list[str]:
        options = "--lora-rank 2 --lora-dropout 0.1 --steps 12 --eval-every 5 --checkpoint-every 3 --threads 1"
        return ["finetune", str(base), str(data), str(tmp_path / out), "--eval", str(held_out), *options.split()]

    def curve(out: str) -> list[Any]:
        return [
            [line.get(name) for name in ("step", "loss", "gradient_norm", "tokens", "evaluation")]
            for line in read_metrics(tmp_path / out)
        ]

    assert main(arguments("whole")) == 0
    killed = subprocess.run([sys.executable, "-c", KILLED_AT_STEP_8, *arguments("killed")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "report.json").exists()
    assert main([*arguments("killed"), "--resume"]) == 0
    assert curve("killed") == curve("whole")
    deltas = [read_lora(tmp_path / run / "delta").factors for run in ("whole", "killed")]
    assert all(np.array_equal(deltas[0][name].b, deltas[1][name].b) for name in deltas[0])


def test_every_epoch_leaves_a_checkpoint(base: Path, data: Path, tmp_path: Path) -> None:
    """Without held-out records, too: nothing else would be there to go on from before the end."""
    config = FinetuneConfig(TrainerConfig(1, 0.03), epochs=3, row_length=64, batch_rows=4)

    def stop_in_the_second(metrics: StepMetrics, steps: int) -> None:
        if metrics.step == steps // 3 + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(base, data, tmp_path / "out", config, on_step=stop_in_the_second)
    report = finetune(base, data, tmp_path / "out", config, resume=True)
    assert report["epochs"] == 3
    assert report["steps"] % 3 == 0


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (LoraConfig(2, 8.0, ("project_q", "w_1")), r"the run began with alpha 4\.0, this one has 8\.0"),
        (LoraConfig(1, 4.0, ("project_q", "w_1")), "the run began with rank 2, this one has 1"),
        (LoraConfig(2, 4.0, ("project_q",)), "the run began with adapters .*, this one has .*"),
    ],
    ids=["alpha", "rank", "fewer layers"],
)
def test_adapters_are_resumed_as_what_they_are(
    base: Path, data: Path, tmp_path: Path, other: LoraConfig, message: str
) -> None:
    """Their numbers would fit, or some of them, and be another model."""
    finetune(base, data, tmp_path / "run", settings(2, LoraConfig(2, 4.0, ("project_q", "w_1"))))
    written = read_lora(tmp_path / "run" / "delta")
    with pytest.raises(CheckpointError, match=message):
        finetune(base, data, tmp_path / "run", settings(2, other), resume=True)
    kept = read_lora(tmp_path / "run" / "delta")
    assert {name: f.scale for name, f in kept.factors.items()} == {n: f.scale for n, f in written.factors.items()}


def test_lora_writes_both_dialects(base: Path, data: Path, tmp_path: Path) -> None:
    report = finetune(base, data, tmp_path / "out", settings(6, LoraConfig(2, 4.0)))
    assert report["lora"] == {
        "rank": 2,
        "alpha": 4.0,
        "targets": ["project_q", "project_v"],
        "dropout": 0.0,
        "layers": 6,
    }
    assert report["memory"]["trainable"] == 6 * 2 * (24 + 20)
    assert report["best_step"] is None
    delta, adapter = read_lora(tmp_path / "out" / "delta"), read_lora(tmp_path / "out" / "adapter")
    assert set(delta.factors) == set(adapter.factors)
    assert all(np.array_equal(delta.factors[name].b, adapter.factors[name].b) for name in delta.factors)
    assert any(factors.b.any() for factors in delta.factors.values())
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("folder", ["delta", "adapter"])
def test_training_goes_on_from_a_delta(
    base: Path, data: Path, held_out: Path, tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In both dialects; the first loss is that of the merged model, and what comes out is a delta of the base."""
    options = ["--steps", "8", "--batch-rows", "4", "--row-length", "64", "--learning-rate", "0.03", "--threads", "1"]

    def arguments(start: Path, out: str, *more: str) -> list[str]:
        return ["finetune", str(start), str(data), str(tmp_path / out), "--eval", str(held_out), *options, *more]

    fresh = ["--lora-rank", "2", "--lora-alpha", "6", "--target", "project_q,layers.1.ffn.ffn.w_out"]
    assert main(arguments(base, "first", *fresh)) == 0
    start = tmp_path / "first" / folder
    assert main(["merge", str(base), str(start), str(tmp_path / "merged")]) == 0
    assert main(arguments(tmp_path / "merged", "from_merged", *fresh)) == 0
    assert main(arguments(base, "second", "--lora", str(start), "--lora-dropout", "0")) == 0
    report = json.loads((tmp_path / "second" / "report.json").read_text(encoding="utf-8"))
    assert (report["lora"]["rank"], report["lora"]["alpha"], report["lora"]["layers"]) == (2, 6.0, 4)
    assert report["lora"]["start"] == str(start)
    losses = {
        run: [line["loss"] for line in read_metrics(tmp_path / run) if "loss" in line]
        for run in ("first", "from_merged", "second")
    }
    assert losses["second"][0] == pytest.approx(losses["from_merged"][0], rel=1e-5)
    assert losses["second"][-1] < losses["first"][-1]
    before, after = read_lora(start).factors, read_lora(tmp_path / "second" / folder).factors
    assert before.keys() == after.keys()
    assert not any(np.array_equal(before[name].a, after[name].a) for name in before)
    capsys.readouterr()
    evaluation = ["eval", str(base), str(held_out), "--lora", str(tmp_path / "second" / folder), "--metrics", "loss"]
    assert main(evaluation) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(report["best_value"], rel=1e-4)


def test_deltas_that_training_cannot_go_on_from(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = finetune(base, data, tmp_path / "out", settings(2, LoraConfig(2, 4.0)))
    delta = read_lora(tmp_path / "out" / "delta")
    bare = tmp_path / "bare.bin"
    bare.write_bytes((tmp_path / "out" / "delta" / "pytorch_model.bin").read_bytes())
    common = ["finetune", str(base), str(data), str(tmp_path / "on"), "--steps", "1", "--lora"]
    for options, code, message in [
        ([report["delta"], "--lora-rank", "2"], 2, "leave --lora-rank and --target out"),
        ([report["adapter"], "--target", "w_0"], 2, "leave --lora-rank and --target out"),
        ([report["adapter"], "--lora-alpha", "5"], 1, "adapter: its configuration says alpha 4, not 5"),
        ([str(bare)], 1, "no configuration beside it gives the LoRA's alpha"),
        ([str(tmp_path / "absent")], 1, "absent: no such file"),
    ]:
        assert main([*common, *options]) == code
        assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="training goes on with its rank, alpha and layers"):
        finetune(base, data, tmp_path / "on", settings(2, LoraConfig(4, 4.0)), delta=delta)
    name, factors = next(iter(delta.factors.items()))
    mixed = LoraDelta(Path("mixed"), {**delta.factors, name: LoraFactors(factors.a, factors.b, 9.0)})
    with pytest.raises(ConfigError, match="mixed: layers differ in rank or scale"):
        LoraConfig.of(mixed)
    assert main([*common, str(bare), "--lora-alpha", "4"]) == 0


def test_one_epoch_of_few_records_shows_each_of_them_once(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_records(tmp_path / "few.jsonl", copy_records(9))
    tokens = TaskSamples(open_records(data), TaskFields(), Tokenizer.from_file(base / "vocab.txt")).lengths.sum()
    for epochs in (1, 4):
        out = tmp_path / str(epochs)
        assert main(["finetune", str(base), str(data), str(out), "--epochs", str(epochs), "--batch-rows", "8"]) == 0
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        assert report["tokens"] == epochs * tokens
        assert report["epochs"] == epochs
        assert report["steps"] == epochs
        said = capsys.readouterr().err
        assert f"{epochs} steps, {epochs}.0 epochs of 1: {tokens} tokens in " in said
        assert f"{epochs} steps are hardly enough to learn anything" in said


def test_the_loss_of_a_smaller_batch_is_a_mean_over_its_own_targets(base: Path, data: Path, tmp_path: Path) -> None:
    """The last step of an epoch, in one batch and in several of which some are blank: the same numbers."""
    curves = []
    for rows, accumulation in ((6, 1), (2, 3), (1, 6)):
        out = tmp_path / str(rows)
        config = FinetuneConfig(TrainerConfig(1, 0.03, warmup=2, accumulation=accumulation), 2, None, 64, rows)
        finetune(base, data, out, config)
        lines = [line for line in read_metrics(out) if "loss" in line]
        curves.append([(line["tokens"], line["loss"], line["gradient_norm"]) for line in lines])
    assert curves[1] == [pytest.approx(values, rel=1e-4) for values in curves[0]]
    assert curves[2] == [pytest.approx(values, rel=1e-4) for values in curves[0]]
    assert len({tokens - before for (tokens, *_), (before, *_) in zip(curves[0][1:], curves[0], strict=False)}) > 1


def test_the_learning_rate_follows_the_configured_batch_however_few_rows_there_are(
    base: Path, data: Path, tmp_path: Path
) -> None:
    options = {"warmup": 0, "reference_batch": 1, "accumulation": 2}
    config = FinetuneConfig(TrainerConfig(1, 0.001, schedule="constant", **options), 2, None, 64, 50)  # type: ignore[arg-type]
    finetune(base, data, tmp_path / "out", config)
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "out") if "loss" in line]
    assert rates == [pytest.approx(0.01)] * 2


def test_command_with_choices_and_tasks(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def named(records: list[dict[str, Any]], task: str) -> list[dict[str, Any]]:
        return [{**record, "kind": task} for record in records]

    data = write_records(tmp_path / "a.jsonl", named(choice_records(16), "choose") + named(copy_records(8), "copy"))
    held_out = write_records(
        tmp_path / "b.jsonl", named(choice_records(6, 1), "choose") + named(copy_records(3, 1), "copy")
    )
    common = [str(base), str(data), str(tmp_path / "out"), "--eval", str(held_out), "--task", "kind"]
    options = ["--epochs", "2", "--batch-rows", "2", "--row-length", "80", "--lora-rank", "2", "--target", "all-linear"]
    assert main(["finetune", *common, *options]) == 0
    out, err = capsys.readouterr()
    assert "best after step" in out
    assert "parameters are trained" in err
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["metric"] == "choice_accuracy"
    assert report["lora"]["layers"] == 21
    assert report["epochs"] == pytest.approx(2, abs=0.2)
    metrics = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8")
    assert "loss/copy" in metrics
    assert "choice_accuracy/choose" in metrics
    assert main(["finetune", *common, *options]) == 1
    assert "holds a run already" in capsys.readouterr().err


def test_wrong_use(base: Path, data: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", str(base), str(data), str(tmp_path / "out"), "--target", "project_q"]) == 2
    assert "need --lora-rank" in capsys.readouterr().err
    assert main(["finetune", str(base), str(data), str(tmp_path / "out"), "--device", "gpu"]) == 1
    assert "no device is called 'gpu'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no metric 'bleu'"):
        settings(metric="bleu")
    with pytest.raises(DataError, match="no held-out record has choices"):
        finetune(base, data, tmp_path / "out", settings(metric="choice_accuracy"), held_out=held_out)
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        finetune(base, data, tmp_path / "out", settings(), resume=True)
    bad = write_records(tmp_path / "bad.jsonl", [{"input": "a", "<ans>": "b"}, {"input": ["a"], "<ans>": "b"}])
    assert main(["finetune", str(base), str(bad), str(tmp_path / "out")]) == 1
    assert f"{bad}, line 2: $.input: expected a string or a dict, not list" in capsys.readouterr().err
