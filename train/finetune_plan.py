"""What fine-tuning does where nothing is said: rules that suit twenty records and two million.

A batch holds a 150th of the data's tokens, at least 256 and at most 4,096; a row an eighth of a batch or the longest
record, whichever is more, in multiples of 64 and at most 512. Epochs are three, or as many as make 400 steps: a model
that takes fewer has hardly begun to learn. The learning rate falls with the square root of the model's width, because
layers divide what they compute by it.
"""

from __future__ import annotations

import logging
import math

import numpy as np
from numpy.typing import NDArray

from cpmbee.train.options import TrainerConfig
from cpmbee.train.task_source import TaskSource

logger = logging.getLogger("cpmbee.train")

_FEW_STEPS = 100  # fewer are worth a warning
_BATCHES = 150  # of an epoch
_LEAST_BATCH_TOKENS, _MOST_BATCH_TOKENS = 256, 4096
_ROWS = 8  # of a batch
_ROW_MULTIPLE, _MOST_ROW_TOKENS = 64, 512
_EPOCHS, _STEPS = 3, 400
_LEARNING_RATE, _ITS_WIDTH = 3e-3, 128
_MOST_PAUSES = 20  # evaluations of a run, and checkpoints, where an epoch is short
_CHECKPOINT_STEPS = 1000  # between checkpoints, where it is long


def default_row_length(lengths: NDArray[np.int64]) -> int:
    """Most tokens of a row, for records of these lengths."""
    wanted = max(int(lengths.max()), _batch_tokens(lengths) // _ROWS)
    return min(_MOST_ROW_TOKENS, -(-wanted // _ROW_MULTIPLE) * _ROW_MULTIPLE)


def default_batch_rows(lengths: NDArray[np.int64], row_length: int) -> int:
    """Rows of a batch, for records of these lengths."""
    return max(1, _batch_tokens(lengths) // row_length)


def default_epochs(source: TaskSource) -> int:
    """Times to see every record."""
    return max(_EPOCHS, math.ceil(_STEPS / source.steps(1)))


def default_learning_rate(hidden_size: int) -> float:
    """The peak rate for a model of this width, or for its adapters."""
    return _LEARNING_RATE * math.sqrt(_ITS_WIDTH / hidden_size)


def default_evaluate_every(epoch_steps: int, steps: int) -> int:
    """Steps between evaluations: an epoch, unless that makes more than 20 of them."""
    return max(1, epoch_steps, steps // _MOST_PAUSES)


def default_checkpoint_every(epoch_steps: int, steps: int) -> int:
    """Steps between checkpoints: as evaluations, but at most 1,000."""
    return min(_CHECKPOINT_STEPS, default_evaluate_every(epoch_steps, steps))


def say_what_is_ahead(source: TaskSource, config: TrainerConfig) -> None:
    """What the run will take, before it takes it."""
    epoch = source.steps(1)
    logger.info(
        "%d steps, %.1f epochs of %d: %d tokens in %d rows, %.0f %% padding, %d rows a step",
        config.steps, config.steps / epoch, epoch, source.tokens, source.rows(0), 100 * source.padding(),
        source.batch_rows * config.accumulation,
    )  # fmt: skip
    if config.steps < _FEW_STEPS:
        logger.warning(
            "%d steps are hardly enough to learn anything: take more epochs, or fewer rows a batch", config.steps
        )


def _batch_tokens(lengths: NDArray[np.int64]) -> int:
    return min(_MOST_BATCH_TOKENS, max(_LEAST_BATCH_TOKENS, int(lengths.sum()) // _BATCHES))
