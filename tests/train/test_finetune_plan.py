"""Defaults that suit the data: what they come to for a few records and for very many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from cpmbee.train.finetune_plan import (
    default_batch_rows,
    default_checkpoint_every,
    default_epochs,
    default_evaluate_every,
    default_learning_rate,
    default_row_length,
)


@dataclass
class Steps:
    """A source of which only the steps of an epoch matter."""

    of_an_epoch: int

    def steps(self, epochs: int) -> int:
        return epochs * self.of_an_epoch


@pytest.mark.parametrize(
    ("records", "tokens", "row_length", "batch_rows", "epochs"),
    [
        (1, 10, 64, 4, 400),
        (24, 20, 64, 4, 200),
        (24, 300, 320, 1, 18),
        (24, 900, 512, 1, 10),  # they are left out, which is said elsewhere
        (2_000, 20, 64, 4, 3),
        (2_000, 100, 192, 6, 3),
        (200_000, 100, 512, 8, 3),
        (2_000_000, 100, 512, 8, 3),
    ],
)
def test_rows_and_epochs(records: int, tokens: int, row_length: int, batch_rows: int, epochs: int) -> None:
    lengths = np.full(records, tokens)
    assert default_row_length(lengths) == row_length
    assert default_batch_rows(lengths, row_length) == batch_rows
    per_epoch = -(-records * tokens // (row_length * batch_rows))
    source: Any = Steps(per_epoch)
    assert default_epochs(source) == epochs
    assert source.steps(epochs) >= 400


def test_pauses() -> None:
    assert default_evaluate_every(4, 300) == 15
    assert default_evaluate_every(40, 120) == 40
    assert default_evaluate_every(1, 1) == 1
    assert default_evaluate_every(48_000, 144_000) == 48_000
    assert default_checkpoint_every(48_000, 144_000) == 1000
    assert default_checkpoint_every(4, 300) == 15


def test_wider_models_learn_more_slowly() -> None:
    assert default_learning_rate(128) == 0.003
    assert default_learning_rate(4 * 128) == pytest.approx(0.0015)
