"""Values for a model that was built without memory, and perhaps split over processes: each keeps its share only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from cpmbee.config import ModelConfig
from cpmbee.model import CpmBee


def empty_model(config: ModelConfig) -> CpmBee:
    """A model without memory: its parameters are on the meta device until `fill` gives them values."""
    with torch.device("meta"):
        return CpmBee(config)


def fill(model: CpmBee, read: Callable[[str], Tensor], device: torch.device) -> None:
    """Give every parameter that is on the meta device its values, in fp32; others move to the device.

    Takes the memory of this process's parameters and of one whole tensor.

    Args:
        model: changed; what is sharded stays so.
        read: gives the whole tensor of a name; every process calls it for the same names, in the order of
            ``named_parameters``.
        device: where this process computes.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            # Always a copy: a parameter that maps a file would change with it.
            whole = read(name) if parameter.is_meta else parameter.detach()
            state[name] = whole.to(device, torch.float32, copy=True)
        elif parameter.is_meta:
            whole = read(name).to(torch.float32)
            share = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
            state[name] = share.clone()  # a share may be a view that keeps all of it
    model.load_state_dict(state, assign=True, strict=False)
