"""Checkpoints of a training run: everything that a killed run needs to go on as if nothing had happened.

    OUTPUT/checkpoints/step-00000500/
        state.json            step, data position, random state, what the best evaluation was, sizes of the other files
        *.safetensors         trained parameters and optimizer state, one file a process

Tensors are written by PyTorch's distributed checkpoints in the safetensors format: another number of processes can read
them, and nothing is unpickled. A checkpoint comes into being by renaming a folder that is complete and on the disk, so
an interrupted one is never taken for a good one.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from cpmbee.errors import CheckpointError, DependencyError
from cpmbee.file_system import sync_entry, sync_folder
from cpmbee.json_file import read_json_object
from cpmbee.train.processes import Processes

try:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
except ImportError:
    raise DependencyError(
        f"training writes its checkpoints with PyTorch 2.9 or newer, this is {torch.__version__}; "
        'pip install "cpmbee[train]" brings it'
    ) from None

FORMAT, SCHEMA_VERSION = "cpmbee-training", 1
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL, _DISCARDED = ".partial-", ".discarded-"
# Frozen parameters come from where the run started; the optimizer's entries are named by parameter, not by number.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True, strict=False)


class RunCheckpoints:
    """The checkpoints of one run, in a folder of their own.

    Args:
        folder: of the checkpoints.
        processes: of the run.
        fixed: JSON data that gives the tensors their meaning; a checkpoint with other data is not read.
    """

    def __init__(self, folder: Path, processes: Processes, fixed: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.processes = processes
        self.fixed = dict(fixed or {})

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(name[1]) for name in names if name)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, model: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Write a checkpoint; all processes must call it.

        Args:
            step: steps done; its name.
            model: its trained parameters are saved.
            optimizer: its state is saved.
            state: JSON data, the same on every process.

        Raises:
            CheckpointError: it cannot be written; nothing is left of it, and those before it are as they were.
        """
        target = self.path(step)
        partial = self.folder / f"{_PARTIAL}{target.name}"

        def begin() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        def publish() -> None:
            head = {"format": FORMAT, "schema_version": SCHEMA_VERSION, "step": step}
            files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
            document = {**head, "fixed": self.fixed, **state, "files": files}
            text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
            (partial / "state.json").write_text(text + "\n", encoding="utf-8")
            sync_folder(partial)
            if target.exists():  # of a run that was resumed from before this step
                self._discard(step)
            partial.rename(target)
            sync_entry(self.folder)

        try:
            self._on_first(begin)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is fine
                save(
                    _tensors(model, optimizer)[0],
                    storage_writer=HuggingFaceStorageWriter(str(partial), save_distributed=True),
                    no_dist=self.processes.world_size == 1,
                )
            self._on_first(publish)
        except BaseException as error:
            if self.processes.first:
                shutil.rmtree(partial, ignore_errors=True)
            reason = _reason(error)
            raise CheckpointError(f"{target}: cannot be written ({reason}); checkpoints before it are kept") from error

    def _on_first(self, action: Callable[[], None]) -> None:
        """Let the first process do something while the others wait; where the disk refuses, it does so for all."""
        refused: OSError | None = None
        if self.processes.first:
            try:
                action()
            except OSError as error:
                refused = error
        if (refused := self.processes.broadcast(refused)) is not None:
            raise refused

    def prune(self, keep: set[int]) -> None:
        """Remove all checkpoints but those of these steps, and what an interrupted save left."""
        if not self.processes.first or not self.folder.is_dir():
            return
        for step in self.steps():
            if step not in keep:
                self._discard(step)
        for leftover in self.folder.glob(".*"):
            if _NAME.fullmatch(leftover.name.removeprefix(_PARTIAL).removeprefix(_DISCARDED)):
                shutil.rmtree(leftover, ignore_errors=True)

    def _discard(self, step: int) -> None:
        """Hide a checkpoint, so that a half-removed one is not taken for a good one, then remove it."""
        hidden = self.folder / f"{_DISCARDED}{self.path(step).name}"
        shutil.rmtree(hidden, ignore_errors=True)
        self.path(step).rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def read_state(self, step: int) -> dict[str, Any]:
        """The JSON part of a checkpoint.

        Raises:
            CheckpointError: it is not there, incomplete, of another format, or of a run whose tensors mean something
                else.
        """
        folder = self.path(step)
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such checkpoint")
        state = read_json_object(folder / "state.json", "the state of a training run", CheckpointError)
        if state.get("format") != FORMAT or state.get("schema_version") != SCHEMA_VERSION or state.get("step") != step:
            raise CheckpointError(f"{folder / 'state.json'}: not the state of step {step} in format {FORMAT} 1")
        then = state.get("fixed")
        for name, now in self.fixed.items():
            was = then.get(name) if isinstance(then, dict) else None
            if was != now:
                raise CheckpointError(f"{folder}: the run began with {name} {was!r:.80}, this one has {now!r:.80}")
        files = state.get("files")
        if not isinstance(files, dict) or not files:
            raise CheckpointError(f"{folder / 'state.json'}: lists no files")
        for name, size in files.items():
            if Path(name).name != name or not (folder / name).is_file() or (folder / name).stat().st_size != size:
                raise CheckpointError(
                    f"{folder / name}: missing, or not the {size} bytes it should have; remove the folder to resume "
                    "from the checkpoint before it"
                )
        extra = {file.name for file in folder.glob("*.safetensors")} - set(files)
        if extra:
            raise CheckpointError(f"{folder}: {sorted(extra)[0]} does not belong to this checkpoint")
        return state

    def load(self, step: int, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Put a checkpoint's tensors into the model, and into the optimizer if one is given.

        Raises:
            CheckpointError: they do not fit, or cannot be read.
        """
        folder = self.path(step)
        tensors, fixed = _tensors(model, optimizer)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                load(
                    tensors,
                    storage_reader=HuggingFaceStorageReader(str(folder)),
                    no_dist=self.processes.world_size == 1,
                )
        except BaseException as error:
            raise CheckpointError(f"{folder}: cannot be loaded into this model: {_reason(error)}") from error
        parts: dict[str, dict[str, Any]] = {"model": {}, "optimizer": dict(fixed)}
        for name, tensor in tensors.items():
            part, _, key = name.partition(".")
            parts[part][key] = tensor
        set_model_state_dict(model, parts["model"], options=_OPTIONS)
        if optimizer is not None:
            set_optimizer_state_dict(model, optimizer, parts["optimizer"], options=_OPTIONS)


def _reason(error: BaseException) -> str:
    """Why PyTorch could not write or read, in one line; what is no failure but an end, such as Ctrl-C, is raised.

    What happens in the writing, interrupts included, comes wrapped in an exception of PyTorch's that is no `Exception`.
    """
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
        error = next((cause for cause in causes if not isinstance(cause, Exception)), causes[0])
    if not isinstance(error, Exception):
        raise error
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())


def _tensors(model: nn.Module, optimizer: Optimizer | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors by name, and the optimizer's options, which the run's configuration determines."""
    parameters: dict[str, Any] = get_model_state_dict(model, options=_OPTIONS)
    tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in parameters.items()}
    fixed: dict[str, Any] = {}
    if optimizer is not None:
        states: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_OPTIONS)
        for name, value in states.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{name}"] = value
            else:
                fixed[name] = value
    return tensors, fixed
