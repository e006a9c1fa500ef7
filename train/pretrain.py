"""Pre-training from a configuration: model, data, evaluation and trainer together, and the checkpoint at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from cpmbee.errors import CheckpointError, ConfigError
from cpmbee.model import CpmBee, open_checkpoint, save_checkpoint
from cpmbee.model.cpmbee import initial_values
from cpmbee.model.loading import tensor_from_array
from cpmbee.model.saving import CHECKPOINT
from cpmbee.model.torch_threads import suited_threads, torch_threads
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.data.source import MixtureSource
from cpmbee.train.filling import empty_model, fill
from cpmbee.train.metrics import StepMetrics
from cpmbee.train.pretrain_config import PretrainConfig
from cpmbee.train.processes import Processes, whole_state
from cpmbee.train.run_folder import require_run_folder
from cpmbee.train.trainer import Trainer, TrainingResult
from cpmbee.train.validation import HeldOutLoss

logger = logging.getLogger("cpmbee.train")

MODEL_FOLDER = "model"
_EVALUATION_SEED = 1


def pretrain(
    config: PretrainConfig,
    output: Path,
    *,
    resume: bool = False,
    on_step: Callable[[StepMetrics], None] | None = None,
) -> TrainingResult:
    """Train, then write the checkpoint ``output/model``: the best one if there were evaluations, else the last.

    Every process of the run calls it.

    Args:
        config: what and how.
        output: folder of the run.
        resume: go on from the newest checkpoint in ``output``.
        on_step: called on the first process after every step.

    Raises:
        CpmBeeError: the configuration, the data, the model or a checkpoint cannot be used, or something else is where
            the run would write.
    """
    processes = Processes.current()
    inputs = (config.checkpoint, config.vocabulary, config.mixture, config.evaluation_mixture)
    require_run_folder(output, {MODEL_FOLDER: CHECKPOINT}, inputs, resume)
    torch.manual_seed(config.seed + processes.rank)
    model, vocabulary = _start(config, processes)
    tokenizer = Tokenizer.from_file(vocabulary)

    def source(mixture: Path, seed: int, rank: int, world_size: int) -> MixtureSource:
        return MixtureSource(
            mixture,
            tokenizer,
            row_length=config.row_length,
            batch_rows=config.batch_rows,
            seed=seed,
            rank=rank,
            world_size=world_size,
            agree=processes.broadcast if world_size > 1 else None,
        )

    evaluate = None
    if config.evaluation_mixture is not None:
        held_out = source(config.evaluation_mixture, _EVALUATION_SEED, 0, 1)
        batches = list(islice(held_out, config.evaluation_batches))
        held_out.close()
        evaluate = HeldOutLoss(batches, held_out.tasks)
    data = source(config.mixture, config.seed, processes.rank, processes.world_size)
    trainer = Trainer(model, config.training, output=output, evaluate=evaluate, on_step=on_step)
    try:
        threads = config.threads or suited_threads(sum(parameter.numel() for parameter in model.parameters()))
        logger.info("threads of the CPU: %d", threads)
        with torch_threads(threads):
            result = trainer.train(data, resume=resume)
    finally:
        data.close()
    if processes.first and data.statistics.samples:
        _say_what_was_read(data)
    if result.best_step is not None:
        trainer.load_best()
    write_model(model, output / MODEL_FOLDER, vocabulary, overwrite=resume)
    return result


def write_model(model: CpmBee, folder: Path, vocabulary: Path, *, overwrite: bool) -> None:
    """Write a trained model, sharded or not, as a checkpoint folder with its vocabulary. All processes must call it."""
    processes = Processes.current()
    state = whole_state(model)
    if processes.first:
        whole = empty_model(model.config)
        whole.load_state_dict(state, assign=True)
        save_checkpoint(whole, folder, vocab_file=vocabulary, overwrite=overwrite)
        logger.info("wrote %s", folder)
    processes.wait()


def _start(config: PretrainConfig, processes: Processes) -> tuple[CpmBee, Path]:
    """The model before the first step, in fp32, split over the processes, and the file of its vocabulary."""
    device = processes.device()
    if config.checkpoint is None:
        vocabulary = config.vocabulary
        if vocabulary is None:
            raise ConfigError("a new model needs a vocabulary")
        model = empty_model(config.model_config(Tokenizer.from_file(vocabulary).vocab_size))
        generator = torch.Generator().manual_seed(config.seed)
        processes.shard(model, device)
        fill(model, lambda name: initial_values(model.get_parameter(name).shape, generator), device)
        return model, vocabulary
    checkpoint = open_checkpoint(config.checkpoint)
    found = config.vocabulary or checkpoint.vocab_file
    if found is None:
        raise CheckpointError(f"{config.checkpoint}: has no vocabulary; name one in the configuration")
    if Tokenizer.from_file(found).vocab_size > checkpoint.config.vocab_size:
        raise ConfigError(f"{found}: has more tokens than the model's {checkpoint.config.vocab_size}")
    model = empty_model(checkpoint.config)
    processes.shard(model, device)
    fill(model, lambda name: tensor_from_array(checkpoint.read(name)), device)
    return model, found


def _say_what_was_read(data: MixtureSource) -> None:
    made = data.statistics
    logger.info(
        "data: %d samples, %.1f %% padding, made at %.0f tokens/s, waited %.1f s for it",
        made.samples, 100 * made.padding_share, made.tokens_per_second, made.waited_seconds,
    )  # fmt: skip
    for reason, counts in (("longer than a row", made.over_long), ("too short to make a request of", made.too_short)):
        if counts:
            left_out = ", ".join(f"{count} of {task}" for task, count in counts.items())
            logger.warning("left out as %s: %s", reason, left_out)
