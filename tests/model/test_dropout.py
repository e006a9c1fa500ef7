"""Dropout while training: each of the four places of a layer acts on its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cpmbee.model import CpmBee
from cpmbee.model.layers import Attention, AttentionBlock, FeedForward, FeedForwardBlock
from tests.model.factory import random_inputs, random_model, tiny_config


def switch_off(model: CpmBee, kept: type[nn.Module]) -> None:
    """Leave dropout in modules of one kind only."""
    for module in model.modules():
        if isinstance(module, Attention | AttentionBlock | FeedForward | FeedForwardBlock) and type(module) is not kept:
            if isinstance(module, Attention):
                module.dropout_p = 0.0
            else:
                module.dropout.p = 0.0


def logits(model: CpmBee, inputs: Any, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        found: torch.Tensor = model(*inputs).logits
    return found


@pytest.mark.parametrize("kept", [Attention, AttentionBlock, FeedForward, FeedForwardBlock])
def test_each_place_acts_on_its_own(kept: type[nn.Module]) -> None:
    config = tiny_config(dropout_p=0.5)
    model = random_model(config)
    switch_off(model, kept)
    inputs = random_inputs(config, 2, 6)
    model.eval()
    quiet = logits(model, inputs, 0)
    assert torch.equal(quiet, logits(model, inputs, 1))
    model.train()
    first = logits(model, inputs, 0)
    assert not torch.allclose(first, quiet, atol=1e-4)
    assert torch.equal(first, logits(model, inputs, 0))
    assert not torch.allclose(first, logits(model, inputs, 1), atol=1e-4)


def test_without_it_training_computes_what_evaluation_does() -> None:
    config = tiny_config(dropout_p=0.5)
    model = random_model(config)
    switch_off(model, nn.Module)
    inputs = random_inputs(config, 2, 6)
    model.eval()
    quiet = logits(model, inputs, 0)
    model.train()
    assert torch.equal(quiet, logits(model, inputs, 0))
