import json
import logging
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpmbee.engine import Engine
from cpmbee.errors import CheckpointError, ConfigError
from cpmbee.model import IGNORE_INDEX, CpmBee
from cpmbee.relation import RelationBuilder
from cpmbee.train.batches import collate, encode_sample
from cpmbee.train.loss import task_losses
from cpmbee.train.metrics import StepMetrics, read_metrics
from cpmbee.train.options import TrainerConfig
from cpmbee.train.schedule import batch_factor, learning_rate_factor
from cpmbee.train.source import BatchSource, rows_of_rank
from cpmbee.train.torch_backend import TorchBackend
from cpmbee.train.trainer import Trainer, TrainingResult
from tests.train.training_runs import LetterSource, run, tiny_model

CPU = torch.device("cpu")


def short_run(steps: int, seed: int = 0, **options: Any) -> tuple[CpmBee, TrainingResult]:
    model = tiny_model(seed=seed)
    source = LetterSource(seed, rows=8)
    return model, Trainer(model, TrainerConfig(steps, warmup=5, **options)).train(source)


def test_the_loss_falls() -> None:
    _, result = short_run(40)
    assert len(result.losses) == 40
    assert np.mean(result.losses[-5:]) < 0.8 * result.losses[0]
    assert result.steps == 40
    assert result.tokens > 40 * 8 * 20


def test_equal_seeds_give_equal_weights() -> None:
    first, second = (short_run(4)[0].state_dict() for _ in "ab")
    other = short_run(4, seed=1)[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_any_iterable_of_batches_will_do_and_one_that_ends_early_is_an_error() -> None:
    batches = list(islice(LetterSource(0, 4), 2))
    one_task = [replace(batch, task_ids=np.minimum(batch.task_ids, 0)) for batch in batches]
    assert len(Trainer(tiny_model(), TrainerConfig(2)).train(iter(one_task)).losses) == 2
    with pytest.raises(ValueError, match="ended after 2 of 3 steps"):
        Trainer(tiny_model(), TrainerConfig(3)).train(one_task)
    with pytest.raises(ValueError, match="task ids 0 to 1, its source 1 tasks"):
        Trainer(tiny_model(), TrainerConfig(1)).train(batches)


def test_a_memorized_pair_is_written_by_the_engine() -> None:
    tokenizer = LetterSource(0, 1).tokenizer
    requests = [{"copy": "ab", "<ans>": ""}, {"last": "ab", "<ans>": ""}]
    solved = [{**request, "<ans>": answer} for request, answer in zip(requests, ["ab", "b"], strict=True)]
    model = tiny_model()
    batch = collate([[encode_sample(data, tokenizer)] for data in solved], tokenizer)
    engine = Engine(TorchBackend(model, 128), tokenizer)
    Trainer(model, TrainerConfig(80, learning_rate=1e-2, warmup=5)).train([batch] * 80)
    assert [result.answer for result in engine.generate(requests)] == ["ab", "b"]
    assert not model.training


def test_losses_per_task_and_the_record_of_a_run(tmp_path: Path) -> None:
    seen: list[StepMetrics] = []
    model = tiny_model()
    source = LetterSource(0, 4)
    assert isinstance(source, BatchSource)
    config = TrainerConfig(3, warmup=2, learning_rate=0.5, tensorboard=True)
    result = Trainer(model, config, output=tmp_path, on_step=seen.append).train(source)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["loss"] for line in lines] == result.losses == [metrics.loss for metrics in seen]
    assert [line["learning_rate"] for line in lines] == [0.25, 0.5, 0.5]
    assert lines[-1]["tokens"] == result.tokens
    assert all(0 < line["padding"] < 1 and line["tokens_per_second"] > 0 for line in lines)

    batch = LetterSource(0, 4).batch()
    losses = task_losses(tiny_model(), batch, RelationBuilder(model.config), 2, CPU)
    for task, name in enumerate(source.tasks):
        targets = ((batch.task_ids == task) & (batch.targets != IGNORE_INDEX)).sum()
        assert lines[0]["task_losses"][name] == pytest.approx(losses[task].item() / targets, rel=1e-5)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_the_learning_rate_follows_the_global_batch_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "cpmbee.train")
    seen: list[StepMetrics] = []
    config = TrainerConfig(1, learning_rate=0.01, warmup=0, schedule="constant", accumulation=2, reference_batch=2)
    Trainer(tiny_model(), config, on_step=seen.append).train(LetterSource(0, 4))
    assert seen[0].learning_rate == pytest.approx(0.02)  # 8 rows: 4 times the reference, the root of which is 2
    assert "global batch 8 rows (1 processes, accumulation 2)" in caplog.text
    assert "0.02 = 0.01 x 2.000 (sqrt of 8 rows over the reference of 2)" in caplog.text


def test_schedules() -> None:
    def factors(schedule: Any) -> list[float]:
        return [learning_rate_factor(schedule, step, 4, 12) for step in range(12)]

    for schedule in ("cosine", "noam", "constant"):
        assert factors(schedule)[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors("constant")[4:] == [1.0] * 8
    assert factors("cosine")[8] == pytest.approx(0.5)
    assert factors("noam")[11] == pytest.approx(math.sqrt(4 / 12))
    assert batch_factor("sqrt", 64, 16) == 2
    assert batch_factor("linear", 64, 16) == 4


def test_accumulation_equals_the_big_batch() -> None:
    big = [LetterSource(5, 8).batch()] * 3
    halves = [rows_of_rank(batch, rank, 2) for batch in big for rank in range(2)]
    results = {}
    for accumulation, batches in ((1, big), (2, halves)):
        model = tiny_model()
        one_task = [replace(batch, task_ids=np.minimum(batch.task_ids, 0)) for batch in batches]
        result = Trainer(model, TrainerConfig(3, accumulation=accumulation, warmup=1)).train(one_task)
        results[accumulation] = (result.losses, model.state_dict())
    assert results[1][0] == pytest.approx(results[2][0], abs=1e-5)
    for name, tensor in results[1][1].items():
        torch.testing.assert_close(tensor, results[2][1][name], atol=1e-4, rtol=1e-4)


def test_a_share_of_a_batch_keeps_what_the_rows_have_in_common() -> None:
    batch = LetterSource(0, 5).batch()
    shares = [rows_of_rank(batch, rank, 2) for rank in range(2)]
    assert np.array_equal(np.concatenate([share.targets for share in shares]), batch.targets)
    assert all(np.array_equal(share.ext_ids, batch.ext_ids) for share in shares)
    with pytest.raises(ValueError, match="5 rows cannot be shared by 6"):
        rows_of_rank(batch, 0, 6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_learns_like_fp32(precision: str) -> None:
    narrow, result = short_run(12, precision=precision)
    assert all(parameter.dtype == torch.float32 for parameter in narrow.parameters())
    expected = short_run(12)[1].losses
    assert result.losses != expected
    assert result.losses == pytest.approx(expected, rel=0.03)


def test_a_step_that_overflows_in_fp16_is_skipped(tmp_path: Path) -> None:
    model = tiny_model()
    trainer = Trainer(model, TrainerConfig(1, precision="fp16"), output=tmp_path)
    trainer.optimizer_step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer.train(LetterSource(0, 4))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert read_metrics(tmp_path)[0]["gradient_norm"] is None
    assert trainer.optimizer_step.scaler.get_scale() == 2.0**59


def test_recomputed_layers_change_nothing() -> None:
    plain, recomputed = (short_run(3, activation_checkpointing=on) for on in (False, True))
    assert plain[1].losses == recomputed[1].losses


def test_frozen_parameters_stay_and_are_not_in_checkpoints(tmp_path: Path) -> None:
    model = tiny_model()
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter to train"):
        Trainer(model, TrainerConfig(1))
    model.input_embedding.weight.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Trainer(model, TrainerConfig(2), output=tmp_path).train(LetterSource(0, 4))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert changed == {"input_embedding.weight"}
    size = before["input_embedding.weight"].numel() * 4
    stored = sum(file.stat().st_size for file in (tmp_path / "checkpoints" / "step-00000002").glob("*.safetensors"))
    assert 3 * size < stored < 4 * size  # the parameter and two averages


def test_a_loss_that_is_not_finite_ends_the_run_with_the_weights_as_they_were() -> None:
    model = tiny_model()
    trainer = Trainer(model, TrainerConfig(2))
    with torch.no_grad():
        model.encoder.output_layernorm.weight[0] = math.inf
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        trainer.train(LetterSource(0, 4))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class ScriptedEvaluation:
    """Gives prepared values, whatever the model."""

    def __init__(self, values: list[float]) -> None:
        self.values = iter(values)

    def __call__(self, model: CpmBee) -> dict[str, float]:
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"accuracy": next(self.values)}


def scripted(values: list[float], **options: Any) -> tuple[TrainerConfig, ScriptedEvaluation]:
    shown = {"evaluate_every": 1, "monitor": "accuracy", "higher_is_better": True, "patience": 2, **options}
    return TrainerConfig(10, warmup=1, **shown), ScriptedEvaluation(values)


def test_early_stopping_and_the_best_checkpoint(tmp_path: Path) -> None:
    config, evaluate = scripted([0.1, 0.5, 0.4, 0.5, 0.9])
    model = tiny_model()
    trainer = Trainer(model, config, output=tmp_path, evaluate=evaluate)
    result = trainer.train(LetterSource(0, 4))
    assert result.stopped_early
    assert (result.steps, result.best_step, result.best_value) == (4, 2, 0.5)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    lines = read_metrics(tmp_path)
    assert [line["evaluation"]["accuracy"] for line in lines if "evaluation" in line] == [0.1, 0.5, 0.4, 0.5]

    last = model.input_embedding.weight.clone()
    trainer.load_best()
    best = model.input_embedding.weight.clone()
    assert not torch.equal(last, best)
    # Resuming a run that stopped early does nothing more.
    again = Trainer(tiny_model(), config, output=tmp_path, evaluate=evaluate).train(LetterSource(0, 4), resume=True)
    assert (again.steps, again.losses, again.best_step) == (4, [], 2)


def test_an_evaluation_must_give_what_decides() -> None:
    config, evaluate = scripted([0.1], monitor="loss")
    with pytest.raises(ConfigError, match="gave accuracy, not 'loss'"):
        Trainer(tiny_model(), config, evaluate=evaluate).train(LetterSource(0, 4))


def test_old_checkpoints_are_removed(tmp_path: Path) -> None:
    run(tmp_path, options={"checkpoint_every": 1, "keep_checkpoints": 3})
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        f"step-{step:08d}" for step in (6, 7, 8)
    ]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    def kill(metrics: StepMetrics) -> None:
        if metrics.step == 2:
            raise KilledError

    config = TrainerConfig(4, checkpoint_every=4)
    whole = Trainer(tiny_model(), config, output=tmp_path / "whole").train(LetterSource(0, 4))
    with pytest.raises(KilledError):
        Trainer(tiny_model(), config, output=tmp_path / "parts", on_step=kill).train(LetterSource(0, 4))
    resumed = Trainer(tiny_model(), config, output=tmp_path / "parts").train(LetterSource(0, 4), resume=True)
    assert resumed.losses == whole.losses
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    config = TrainerConfig(2)
    with pytest.raises(CheckpointError, match="no checkpoint to resume"):
        Trainer(tiny_model(), config, output=tmp_path).train(LetterSource(0, 4), resume=True)
    with pytest.raises(CheckpointError, match="without an output folder"):
        Trainer(tiny_model(), config).train(LetterSource(0, 4), resume=True)
    Trainer(tiny_model(), config, output=tmp_path).train(LetterSource(0, 4))
    with pytest.raises(CheckpointError, match="holds a run already"):
        Trainer(tiny_model(), config, output=tmp_path).train(LetterSource(0, 4))
    with pytest.raises(CheckpointError, match="no position to return to"):
        Trainer(tiny_model(), config, output=tmp_path).train(iter(LetterSource(0, 4)), resume=True)
    with pytest.raises(CheckpointError, match="no best checkpoint"):
        Trainer(tiny_model(), config).load_best()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncate", "missing, or not the"),
        ("remove", "missing, or not the"),
        ("add", "does not belong"),
        ("no state", "cannot read the state"),
        ("not json", "not JSON"),
        ("other format", "not the state of step 2"),
        ("path", "missing, or not the"),
        ("other model", "cannot be loaded into this model"),
        ("no source", "unusable"),
    ],
)
def test_broken_checkpoints_give_one_line(tmp_path: Path, damage: str, message: str) -> None:
    Trainer(tiny_model(), TrainerConfig(2), output=tmp_path).train(LetterSource(0, 4))
    folder = tmp_path / "checkpoints" / "step-00000002"
    tensors, state = next(folder.glob("*.safetensors")), folder / "state.json"
    content = json.loads(state.read_text())
    model = tiny_model()
    if damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif damage == "remove":
        tensors.unlink()
    elif damage == "add":
        (folder / "other.safetensors").write_bytes(tensors.read_bytes())
    elif damage == "no state":
        state.unlink()
    elif damage == "not json":
        state.write_text("{")
    elif damage == "other format":
        state.write_text(json.dumps({**content, "format": "x"}))
    elif damage == "path":
        state.write_text(json.dumps({**content, "files": {"../../../x": 1}}))
    elif damage == "other model":
        model.input_embedding.weight = torch.nn.Parameter(torch.zeros(3, 32))
    else:
        del content["source"]
        state.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message) as caught:
        Trainer(model, TrainerConfig(2), output=tmp_path).train(LetterSource(0, 4), resume=True)
    assert "step-00000002" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_resuming_with_other_options_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Trainer(tiny_model(), TrainerConfig(2), output=tmp_path).train(LetterSource(0, 4))
    Trainer(tiny_model(), TrainerConfig(3), output=tmp_path).train(LetterSource(0, 4), resume=True)
    assert "resuming with other options than the run began with: steps 3 (was 2)" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "steps is missing"),
        ({"steps": 0}, "steps must be an integer from 1"),
        ({"steps": 1, "learning_rate": math.nan}, "learning_rate must be a number"),
        ({"steps": 1, "schedule": "linear"}, "schedule must be one of"),
        ({"steps": 1, "lr": 1.0}, "no option 'lr'"),
        ({"steps": 1, "betas": [1.0]}, "betas must be two numbers"),
        ({"steps": 1, "tensorboard": "no"}, "tensorboard must be true or false, not 'no'"),
        ({"steps": True}, "steps must be an integer"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainerConfig.from_dict(options)


def test_options_survive_json() -> None:
    config = TrainerConfig(3, schedule="noam", patience=2, betas=(0.8, 0.9))
    assert TrainerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
