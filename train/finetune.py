"""Fine-tuning a checkpoint on supervised records: all parameters, or LoRA adapters.

The output folder gets ``checkpoints/``, from which a killed run goes on; ``metrics.jsonl``, the loss of every step and
evaluations; ``report.json``, what was trained on what, sizes, memory. The best model comes as a checkpoint in
``model/`` (full) or as ``delta/`` and ``adapter/``, its adapters in the research code's names and in PEFT's (LoRA).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from cpmbee.errors import ConfigError, DataError
from cpmbee.model import CpmBee, open_checkpoint
from cpmbee.model.loading import tensor_from_array
from cpmbee.model.lora import LoraDelta
from cpmbee.model.lora_saving import DELTAS, save_lora
from cpmbee.model.saving import CHECKPOINT, Dialect, save_tensors
from cpmbee.model.tensor_names import expected_tensors
from cpmbee.model.torch_threads import suited_threads, torch_threads
from cpmbee.staging import staged_file
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.filling import empty_model, fill
from cpmbee.train.finetune_plan import (
    default_batch_rows,
    default_checkpoint_every,
    default_epochs,
    default_evaluate_every,
    default_row_length,
    say_what_is_ahead,
)
from cpmbee.train.footprint import Footprint, peak_memory
from cpmbee.train.jsonl import open_records
from cpmbee.train.lora import LoraConfig, add_adapters, delta_of, load_adapters
from cpmbee.train.metrics import StepMetrics
from cpmbee.train.options import TrainerConfig
from cpmbee.train.predictions import METRICS
from cpmbee.train.processes import Processes, whole_state
from cpmbee.train.run_folder import REPORT, require_run_folder
from cpmbee.train.schedule import batch_factor
from cpmbee.train.task_metrics import TaskMetrics
from cpmbee.train.task_samples import TaskSamples
from cpmbee.train.task_source import TaskSource
from cpmbee.train.tasks import TaskFields, TaskRecord, read_tasks
from cpmbee.train.trainer import Trainer, TrainingResult

logger = logging.getLogger("cpmbee.train")


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune.

    Attributes:
        trainer: options of the training loop. ``steps`` is replaced where ``epochs`` is given, ``evaluate_every`` and
            ``checkpoint_every`` where they are 0; ``monitor`` and ``higher_is_better`` follow ``metric``.
        epochs: times to see every record; None takes ``trainer.steps``; what "auto" and other values that are not given
            become is said in `cpmbee.train.finetune_plan`.
        lora: adapters to train instead of all parameters; where training goes on from a delta, `LoraConfig.of` it.
        row_length: most tokens of a row, in which several records may lie; None suits the data.
        batch_rows: rows of a batch over all processes; None suits the data.
        fields: what some of the records' fields mean.
        metric: of `cpmbee.train.predictions.METRICS`, that decides which evaluation is best; None takes
            ``choice_accuracy`` where the held-out records have choices, else ``loss``.
        seed: of data order, adapters and dropout.
        dialect: of the checkpoint that a full run writes.
        threads: of the CPU; 0 takes what suits the model.
    """

    trainer: TrainerConfig
    epochs: int | Literal["auto"] | None = None
    lora: LoraConfig | None = None
    row_length: int | None = None
    batch_rows: int | None = None
    fields: TaskFields = field(default_factory=TaskFields)
    metric: str | None = None
    seed: int = 0
    dialect: Dialect = "huggingface"
    threads: int = 0

    def __post_init__(self) -> None:
        if self.metric is not None and self.metric not in METRICS:
            raise ConfigError(f"no metric {self.metric!r}; there are {', '.join(METRICS)}")
        for name in ("epochs", "row_length", "batch_rows"):
            value = getattr(self, name)
            if value is not None and (name, value) != ("epochs", "auto") and (type(value) is not int or value < 1):
                raise ConfigError(f"fine-tuning: {name} must be an integer from 1 on, not {value!r}")


def finetune(
    checkpoint: str | Path,
    data: str | Path,
    out: str | Path,
    config: FinetuneConfig,
    *,
    held_out: str | Path | None = None,
    vocab: str | Path | None = None,
    delta: LoraDelta | None = None,
    device: str | torch.device = "cpu",
    resume: bool = False,
    on_step: Callable[[StepMetrics, int], None] | None = None,
) -> dict[str, Any]:
    """Train, keep the best, and write it.

    Args:
        checkpoint: of the base model.
        data: JSON Lines of records with their right answers, or the folder of a data set.
        out: folder to write.
        config: how.
        held_out: records to evaluate on, as ``data``; without them the last step is taken for the best.
        vocab: vocabulary, if none lies beside the checkpoint.
        delta: adapters to go on from, for ``config.lora``; None begins with fresh ones.
        device: where to train.
        resume: go on from the last checkpoint in ``out``; the same options must be given.
        on_step: called on the first process after every step, with the number of steps of the run.

    Returns:
        What ``report.json`` holds.

    Raises:
        ConfigError: an option is out of range, or there is no vocabulary.
        DataError: a record cannot be used; names file, line and path.
        CheckpointError: the checkpoint cannot be read, ``out`` holds a run (and ``resume`` is not set) or none, or
            something else is where the run would write.
        FloatingPointError: the loss is no longer finite.
    """
    processes, out = Processes.current(), Path(out)
    results = {"model": CHECKPOINT} if config.lora is None else {"delta": DELTAS["original"], "adapter": DELTAS["peft"]}
    inputs = (checkpoint, data, held_out, vocab, None if delta is None else delta.path)
    require_run_folder(out, results, inputs, resume)
    opened = open_checkpoint(checkpoint)
    vocabulary = vocab or opened.vocab_file
    if vocabulary is None:
        raise ConfigError(f"{checkpoint}: no vocabulary beside the checkpoint; name one")
    tokenizer = Tokenizer.from_file(vocabulary)
    source = _source(TaskSamples(open_records(data), config.fields, tokenizer), config, processes)
    evaluation = None if held_out is None else list(read_tasks(open_records(held_out), config.fields))
    metric = _metric(config, evaluation)
    trainer_config = _trainer_config(config, source, metric)
    torch.manual_seed(config.seed + processes.rank)  # processes drop out differently
    model = empty_model(opened.config)
    adapted = _adapt(model, config, delta)
    footprint = Footprint.of(model)
    if processes.first:
        logger.info("%s", footprint)
        say_what_is_ahead(source, trainer_config)
    processes.shard(model, torch.device(device))
    fill(model, lambda name: tensor_from_array(opened.read(name)), torch.device(device))
    trainer = Trainer(
        model,
        trainer_config,
        output=out,
        evaluate=None if evaluation is None else TaskMetrics(evaluation, tokenizer, _metrics(metric, evaluation)),
        on_step=None if on_step is None else lambda metrics: on_step(metrics, trainer_config.steps),
        fixed=_fixed(config.lora, adapted),
    )
    threads = config.threads or suited_threads(sum(parameter.numel() for parameter in model.parameters()))
    logger.info("threads of the CPU: %d", threads)
    with torch_threads(threads):
        result = trainer.train(source, resume)
    if result.best_step is not None and result.best_step != result.steps:
        trainer.load_best()
    written = _write_best(model, config, checkpoint, vocabulary, out, processes, resume)
    report = _report(config, trainer_config, source, result, footprint, adapted)
    report.update({"base": str(checkpoint), "data": str(data), "metric": metric, **written})
    if held_out is not None:
        report["held_out"] = str(held_out)
    if delta is not None:
        report["lora"]["start"] = str(delta.path)
    if processes.first:
        with staged_file(out / REPORT) as file:
            file.write(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return report


def _adapt(model: CpmBee, config: FinetuneConfig, delta: LoraDelta | None) -> list[str]:
    """Put adapters beside the model's layers, if it is adapters that are trained; the names of these layers."""
    if delta is None:
        return [] if config.lora is None else add_adapters(model, config.lora, config.seed)
    if config.lora is None or LoraConfig.of(delta, config.lora.dropout) != config.lora:
        raise ConfigError(
            f"{delta.path}: training goes on with its rank, alpha and layers (LoraConfig.of); give no others"
        )
    return load_adapters(model, delta, config.lora.dropout)


def _fixed(lora: LoraConfig | None, adapted: list[str]) -> dict[str, Any]:
    """What the adapters' numbers mean, and for which layers: resumed with another alpha they were another model."""
    return {} if lora is None else {"rank": lora.rank, "alpha": lora.alpha, "adapters": sorted(adapted)}


def _metric(config: FinetuneConfig, evaluation: list[TaskRecord] | None) -> str:
    """The metric that decides."""
    choices = evaluation is not None and any(record.choices is not None for record in evaluation)
    if config.metric == "choice_accuracy" and not choices:
        raise DataError("choice_accuracy cannot decide which model is best: no held-out record has choices")
    return config.metric or ("choice_accuracy" if choices else "loss")


def _metrics(metric: str, evaluation: list[TaskRecord]) -> list[str]:
    """What evaluations measure: the loss, choices where there are some, written answers (slow) where they decide."""
    choices = any(record.choices is not None for record in evaluation)
    return ["loss", *(["choice_accuracy"] if choices else []), *(["exact_match"] if metric == "exact_match" else [])]


def _source(samples: TaskSamples, config: FinetuneConfig, processes: Processes) -> TaskSource:
    """The batches, in rows as configured or as suits the data."""
    row_length = config.row_length
    if row_length is None:
        row_length = default_row_length(samples.lengths)
    batch_rows = config.batch_rows
    if batch_rows is None:
        batch_rows = default_batch_rows(samples.lengths, row_length)
    return TaskSource(
        samples,
        row_length=row_length,
        batch_rows=batch_rows,
        accumulation=config.trainer.accumulation,
        seed=config.seed,
        rank=processes.rank,
        world_size=processes.world_size,
    )


def _trainer_config(config: FinetuneConfig, source: TaskSource, metric: str) -> TrainerConfig:
    options = config.trainer.to_dict()
    epochs = default_epochs(source) if config.epochs == "auto" else config.epochs
    if epochs is not None:
        options["steps"] = source.steps(epochs)
    if config.trainer.reference_batch is not None:  # not left to the trainer: its first batch may be an epoch's last
        rows = source.batch_rows * config.trainer.accumulation
        options["learning_rate"] *= batch_factor(config.trainer.batch_scaling, rows, config.trainer.reference_batch)
        options["reference_batch"] = None
    steps, epoch = options["steps"], source.steps(1)
    options["warmup"] = min(options["warmup"], steps // 10)
    options["evaluate_every"] = options["evaluate_every"] or default_evaluate_every(epoch, steps)
    options["checkpoint_every"] = options["checkpoint_every"] or default_checkpoint_every(epoch, steps)
    return TrainerConfig.from_dict({**options, "monitor": metric, "higher_is_better": metric != "loss"})


def _write_best(
    model: CpmBee,
    config: FinetuneConfig,
    base: str | Path,
    vocabulary: str | Path,
    out: Path,
    processes: Processes,
    resume: bool,
) -> dict[str, str]:
    """Write the model's parameters or its adapters; the names in the report of what was written."""
    if config.lora is not None:
        delta = delta_of(model)  # gathered by all processes
        folders = {"delta": out / "delta", "adapter": out / "adapter"}
        if processes.first:
            name, dropout = str(base), config.lora.dropout
            save_lora(delta, folders["delta"], "original", base_model=name, dropout=dropout, overwrite=resume)
            save_lora(delta, folders["adapter"], "peft", base_model=name, dropout=dropout, overwrite=resume)
        return {name: str(folder) for name, folder in folders.items()}
    state = whole_state(model)
    folder = out / "model"
    if processes.first:
        dtypes = {name: state[name].dtype for name in expected_tensors(model.config)}
        save_tensors(
            model.config,
            dtypes,
            lambda name: state[name].detach(),
            folder,
            config.dialect,
            vocab_file=vocabulary,
            overwrite=resume,
        )
    return {"model": str(folder)}


def _report(
    config: FinetuneConfig,
    trainer_config: TrainerConfig,
    source: TaskSource,
    result: TrainingResult,
    footprint: Footprint,
    adapted: list[str],
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "steps": result.steps,
        "epochs": round(source.epochs_done, 2),
        "tokens": result.tokens,
        "seconds": round(result.seconds, 1),
        "last_loss": result.losses[-1] if result.losses else None,
        "best_step": result.best_step,
        "best_value": result.best_value,
        "stopped_early": result.stopped_early,
        "records_left_out": source.over_long,
        "training": {**trainer_config.to_dict(), "row_length": source.row_length, "batch_rows": source.batch_rows},
        "memory": {**footprint.to_dict(), **peak_memory()},
    }
    if config.lora is not None:
        report["lora"] = {**asdict(config.lora), "targets": list(config.lora.targets), "layers": len(adapted)}
    return report
