"""Threads of PyTorch: one for small models, and no more than the machine lets the process use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cpmbee.model import torch_threads as module
from cpmbee.model.torch_threads import suited_threads, torch_threads


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("parameters", "cores", "expected"), [(2_000_000, 8, 1), (19_999_999, 8, 1), (20_000_000, 8, 3), (10**9, 2, 2)]
)
def test_what_suits_a_model(monkeypatch: pytest.MonkeyPatch, parameters: int, cores: int, expected: int) -> None:
    monkeypatch.setattr(module, "physical_cores", lambda: cores)
    assert suited_threads(parameters) == expected


def test_the_number_is_as_before_afterwards() -> None:
    def fail() -> None:
        with torch_threads(1):
            raise ValueError(torch.get_num_threads())

    with pytest.raises(ValueError, match=r"^1$"):
        fail()
    assert torch.get_num_threads() == 3
