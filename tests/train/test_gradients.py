"""Gradients of a packed batch: against finite differences in fp64, and where queries see nothing."""

import numpy as np
import pytest
import torch

from cpmbee.model import IGNORE_INDEX, CpmBee
from cpmbee.relation import RelationBuilder
from cpmbee.train.batches import TrainingBatch
from cpmbee.train.loss import task_losses
from tests.train.training_runs import LetterSource, tiny_model

CPU = torch.device("cpu")
TABLE = "position_bias.relative_attention_bias"
STEP = 1e-5


def wide_model() -> CpmBee:
    return tiny_model(seed=3).double()


def mean_loss(model: CpmBee, batch: TrainingBatch) -> torch.Tensor:
    losses = task_losses(model, batch, RelationBuilder(model.config), len(LetterSource.tasks), CPU)
    return losses.sum() / int((batch.targets != IGNORE_INDEX).sum())


@pytest.fixture(scope="module")
def packed_batch() -> TrainingBatch:
    """Two rows of several samples with extension tokens, and padding."""
    batch = LetterSource(1, rows=2).batch()
    assert (batch.spans.max(1) > 0).all()
    assert len(batch.ext_ids) > 0
    assert (batch.length < batch.input_ids.shape[1]).all()
    return batch


def test_gradients_match_finite_differences(packed_batch: TrainingBatch) -> None:
    model = wide_model()
    mean_loss(model, packed_batch).backward()  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        expected = _slope(model, packed_batch, parameter, direction)
        assert (parameter.grad * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-9), name


def test_every_row_of_the_bias_table_gets_its_own_gradient(packed_batch: TrainingBatch) -> None:
    model = wide_model()
    mean_loss(model, packed_batch).backward()  # type: ignore[no-untyped-call]
    table = dict(model.named_parameters())[TABLE]
    assert table.grad is not None
    relation = packed_batch.relation(RelationBuilder(model.config))
    used = np.unique(relation[relation >= 0])
    unused = np.setdiff1d(np.arange(len(table)), used)
    assert len(used) > 5
    assert not table.grad[unused].any()
    for row in used[:: max(1, len(used) // 6)]:
        direction = torch.zeros_like(table)
        direction[row, 1] = 1
        expected = _slope(model, packed_batch, table, direction)
        assert table.grad[row, 1].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def _slope(model: CpmBee, batch: TrainingBatch, parameter: torch.Tensor, direction: torch.Tensor) -> float:
    """Central difference of the loss along a direction."""
    values = []
    with torch.no_grad():
        for sign in (1, -1):
            parameter.add_(direction, alpha=sign * STEP)
            values.append(mean_loss(model, batch).item())
            parameter.sub_(direction, alpha=sign * STEP)
    return (values[0] - values[1]) / (2 * STEP)


def test_a_query_that_sees_nothing_gives_zeros_and_zero_gradients() -> None:
    model = wide_model()
    config = model.config
    h = torch.randn(1, 3, config.hidden_size, dtype=torch.float64, requires_grad=True)
    relation = torch.tensor([[[0, -1, -1], [-1, -1, -1], [3, 4, -1]]], dtype=torch.int16)
    attention = model.encoder.layers[0].self_att.self_attention  # type: ignore[union-attr]
    out, _ = attention(h, model.position_bias(relation), None)  # type: ignore[operator]
    assert not out[0, 1].any()
    assert out.isfinite().all()
    table = model.position_bias.relative_attention_bias

    blind = torch.autograd.grad(out[0, 1].sum(), (h, table), retain_graph=True)
    assert not any(gradient.any() for gradient in blind)
    seeing = torch.autograd.grad(out.sum(), (h, table))
    assert all(gradient.isfinite().all() for gradient in seeing)
    assert seeing[1][4].any()
    assert not h.grad
