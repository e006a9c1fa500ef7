"""What is wrong with a run, said before any of it starts: a broken folder, too little memory, impossible requests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cpmbee.bench.cost import cache_row_bytes, num_parameters, operations
from cpmbee.bench.plan import Subject, Workload
from cpmbee.cache_types import CACHE_DTYPES
from cpmbee.encoding import Data
from cpmbee.errors import ConfigError, VocabularyError
from cpmbee.folder import ModelFolder, open_folder
from cpmbee.machine import physical_memory
from cpmbee.prompt import encode_prompt
from cpmbee.tokenizer import Tokenizer

EMPTY: Data = {"input": "", "<ans>": ""}
COPIES = {"fp16": 3}  # of the bytes of stored weights at most: the runtime keeps them in fp32 beside the file
SCALE_BYTES = 4
RELATION_BYTES = 2  # of each pair of a prompt's tokens


def open_subjects(folders: Sequence[Path]) -> list[tuple[Subject, ModelFolder]]:
    """Our models, each found complete and loadable as far as its files tell.

    Raises:
        ModelFolderError: a folder is incomplete, altered or unsafe; names the file.
        VocabularyError: the tokenizer is missing, unreadable or of another model.
        ConfigError: two folders have one name.
    """
    found: list[tuple[Subject, ModelFolder]] = []
    for path in folders:
        folder = open_folder(path)
        tokens = Tokenizer.from_file(folder.vocabulary).vocab_size
        if tokens != folder.config.vocab_size:
            raise VocabularyError(f"{folder.vocabulary}: {tokens} tokens, but the model has {folder.config.vocab_size}")
        found.append((_subject(folder), folder))
    labels = [subject.label for subject, _ in found]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigError(f"two folders are called {twice[0]}; tables could not tell them apart, rename one")
    return found


def check_workloads(found: Sequence[tuple[Subject, ModelFolder]], workloads: Sequence[Workload]) -> None:
    """See that every model can be asked every workload, and fits memory while it is.

    Raises:
        ConfigError: a prompt is shorter than the shortest request, or a model and its cache exceed the memory.
    """
    memory = physical_memory()
    for subject, folder in found:
        shortest = len(encode_prompt(EMPTY, Tokenizer.from_file(folder.vocabulary))) + 1
        for workload in workloads:
            if workload.prompt < shortest:
                raise ConfigError(f"a prompt has at least {shortest} tokens, not {workload.prompt}")
            if workload.answer < 2:
                raise ConfigError(f"an answer has at least 2 tokens, for decoding to be timed, not {workload.answer}")
            if reason := does_not_fit(subject, workload, memory):
                raise ConfigError(f"{folder.path}: {reason}")


def does_not_fit(subject: Subject, workload: Workload, memory: int) -> str:
    """Why ``memory`` bytes are too little for a workload; empty where they are enough."""
    needed = subject.memory_bytes(workload)
    if needed <= memory:
        return ""
    rows = workload.cache_rows
    return (
        f"needs about {needed / 1e9:.1f} GB of memory for prompts of {workload.prompt} tokens "
        f"({subject.loaded_bytes / 1e9:.1f} GB for the loaded model, {rows * subject.row_bytes / 1e9:.1f} GB for "
        f"{rows} cache rows in {subject.cache}), but this machine has {memory / 1e9:.1f} GB"
    )


def require_folder(path: Path) -> None:
    """See that files can be written into a folder, which need not be there yet.

    Raises:
        ConfigError: they cannot.
    """
    nearest = path.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ConfigError(f"{nearest}: is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{nearest}: nothing may be written there")


def folder_row_bytes(folder: ModelFolder) -> int:
    """Bytes that one token takes in the cache of a folder's type: keys and values, in int8 a scale for each head."""
    config = folder.config
    numbers = cache_row_bytes(config, np.dtype(CACHE_DTYPES[folder.cache]).itemsize)
    scales = 2 * SCALE_BYTES * len(config.attention_layers) * config.num_attention_heads
    return numbers + (scales if folder.cache == "int8" else 0)


def _subject(folder: ModelFolder) -> Subject:
    files = [file for file in folder.path.iterdir() if file.name.startswith("model.onnx.")]
    size = sum(file.stat().st_size for file in files)
    return Subject(
        label=folder.path.resolve().name,
        model=folder.path.resolve().name,
        engine="cpmbee",
        module="cpmbee.bench.cell",
        path=folder.path.resolve(),
        precision=folder.precision.get("ffn", "?"),
        cache=folder.cache,
        parameters=num_parameters(folder.config),
        file_bytes=sum(file.stat().st_size for file in folder.path.iterdir() if file.is_file()),
        weight_bytes=size,
        operations=operations(folder.config),
        loaded_bytes=COPIES.get(folder.precision.get("ffn", ""), 1) * size,
        row_bytes=folder_row_bytes(folder),
        pair_bytes=RELATION_BYTES,
    )
