"""One optimizer step: what is clipped, in every precision, and what decays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpmbee.train.processes import Processes
from cpmbee.train.step import OptimizerStep, Precision
from tests.train.training_runs import LetterSource, tiny_model

MOST = 0.05  # less than any gradient's norm here


def gradients_of(precision: Precision, max_grad_norm: float) -> tuple[float, torch.Tensor]:
    """The norm that a step reports, and the gradients that the optimizer gets, in one row."""
    model = tiny_model()
    step = OptimizerStep(
        model,
        Processes(0, 1),
        betas=(0.9, 0.98),
        eps=1e-8,
        weight_decay=0.0,
        max_grad_norm=max_grad_norm,
        precision=precision,
    )
    result = step([LetterSource(3, 4).batch()], len(LetterSource.tasks), 1e-3)
    gradients = [parameter.grad.flatten() for parameter in step.trained if parameter.grad is not None]
    assert len(gradients) == len(step.trained)
    return result.gradient_norm, torch.cat(gradients)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_gradients_are_clipped_after_their_norm_is_taken(precision: Precision) -> None:
    norm, clipped = gradients_of(precision, MOST)
    assert norm > 2 * MOST
    assert clipped.norm().item() == pytest.approx(MOST, rel=1e-3)
    free_norm, free = gradients_of(precision, 1e9)
    assert free_norm == pytest.approx(norm, rel=1e-3)
    torch.testing.assert_close(clipped, free * (MOST / norm), rtol=1e-2, atol=1e-6)


def test_fp16_clips_what_fp32_would() -> None:
    """The loss is scaled there, so that gradients are 65,536 times as large until they are unscaled."""
    norms, gradients = zip(*(gradients_of(precision, MOST) for precision in ("fp32", "fp16")), strict=True)
    assert norms[1] == pytest.approx(norms[0], rel=0.02)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999
    assert gradients[1].norm().item() == pytest.approx(gradients[0].norm().item(), rel=1e-3)


def test_matrices_decay_and_nothing_else_does() -> None:
    model = tiny_model()
    step = OptimizerStep(
        model, Processes(0, 1), betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1, max_grad_norm=1.0, precision="fp32"
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = {
        names[id(parameter)]: group["weight_decay"]
        for group in step.optimizer.param_groups
        for parameter in group["params"]
    }
    assert set(decay) == set(names.values())
    free = {name for name, value in decay.items() if value == 0}
    assert free == {name for name in decay if "layernorm" in name or name.startswith("position_bias")}
    assert np.unique(list(decay.values())).tolist() == [0.0, 0.1]
