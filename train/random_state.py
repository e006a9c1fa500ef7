"""PyTorch's random state as JSON data: what decides dropout."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import torch


def random_state(device: torch.device) -> dict[str, str]:
    """The state of this process's generators: the CPU's, and the device's where that is another."""
    state = {"cpu": _encode(torch.get_rng_state())}
    if device.type == "cuda":
        state["cuda"] = _encode(torch.cuda.get_rng_state(device))
    return state


def set_random_state(states: Sequence[dict[str, Any]], rank: int, device: torch.device) -> None:
    """Restore what `random_state` gave on each process; a process that was not there then keeps its own state."""
    if rank < len(states):
        torch.set_rng_state(_decode(states[rank]["cpu"]))
        if device.type == "cuda" and "cuda" in states[rank]:
            torch.cuda.set_rng_state(_decode(states[rank]["cuda"]), device)


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
