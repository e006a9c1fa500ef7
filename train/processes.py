"""The processes of a run, as ``torchrun`` starts them; several share each batch and, through FSDP2, the model."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from cpmbee.errors import ConfigError
from cpmbee.model import CpmBee

# Gloo's threads may hold the tensors of an operation for a moment after it is over. Letting go of them takes Python's
# lock, and a thread that wants it from an interpreter that is shutting down aborts the process.
_SETTLING_SECONDS = 0.5


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that ``torchrun`` started, if it did; without it nothing happens."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
        dist.barrier()  # nobody hangs up while others still talk
        if dist.get_backend() == "gloo":
            time.sleep(_SETTLING_SECONDS)
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class Processes:
    """Who takes part.

    Attributes:
        rank: number of this process.
        world_size: how many there are.
    """

    rank: int
    world_size: int

    @classmethod
    def current(cls) -> Processes:
        """The initialized process group, or this process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls(0, 1)

    @property
    def first(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def sum(self, values: NDArray[Any], device: torch.device) -> NDArray[np.float64]:
        """Elementwise sum over all processes, in float64."""
        if self.world_size == 1:
            return values.astype(np.float64)
        total = torch.from_numpy(values.astype(np.float64)).to(device)
        dist.all_reduce(total)
        summed: NDArray[np.float64] = total.cpu().numpy()
        return summed

    def gather(self, value: object) -> list[Any]:
        """The values of all processes, in order of rank, on every process."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """The first process's value, on every process."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def device(self, name: str = "auto") -> torch.device:
        """Where this process computes.

        Args:
            name: such as ``cpu`` or ``cuda:1``; ``auto`` is a GPU of its own if there are any, else the CPU.

        Raises:
            ConfigError: there is no such device, or it cannot be used.
        """
        if name == "auto":
            cuda = torch.cuda.is_available()
            return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ConfigError(f"no device is called {name!r}; there are cpu, cuda, cuda:1, ...") from None
        try:
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:  # the latter where PyTorch was built without it
            reason = " ".join(str(error).partition("\n")[0].split())
            raise ConfigError(f"device {name!r} cannot be used here: {reason}") from None
        return device

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world_size > 1:
            dist.barrier()

    def shard(self, model: CpmBee, device: torch.device) -> None:
        """Split the parameters over the processes with FSDP2: one unit a layer, and one for what is left.

        A model that is split already stays as it is.
        """
        if self.world_size == 1:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if isinstance(model, FSDPModule):
            return
        mesh = init_device_mesh(device.type, (self.world_size,))
        for layer in model.encoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, gathered on the CPU; complete on the first process, empty on the others. All must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=Processes.current().world_size > 1)
    state = get_model_state_dict(model, options=options)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
