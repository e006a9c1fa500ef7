"""How many threads of the CPU PyTorch computes a model with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cpmbee.machine import physical_cores

SMALL_MODEL_PARAMETERS = 20_000_000


def suited_threads(parameters: int) -> int:
    """One for a model of few parameters, else as many as PyTorch takes, within what control groups allow.

    PyTorch's threads meet after every operation. A small model's operations are shorter than that takes once others use
    the cores, too, and then a step takes several times as long as with one thread.
    """
    return 1 if parameters < SMALL_MODEL_PARAMETERS else min(torch.get_num_threads(), physical_cores())


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let PyTorch compute with so many threads, and with as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
