"""Small models train, and are asked, with one thread unless another number is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cpmbee import Engine
from cpmbee.model import load_model, open_checkpoint
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.finetune import FinetuneConfig, finetune
from cpmbee.train.options import TrainerConfig
from cpmbee.train.torch_backend import TorchBackend
from tests.model.factory import write_checkpoint
from tests.train.task_files import copy_records, write_records


@pytest.mark.parametrize(("asked", "expected"), [(0, 1), (2, 2)])
def test_threads_of_training(tmp_path: Path, asked: int, expected: int) -> None:
    torch.set_num_threads(3)
    base = write_checkpoint(tmp_path / "base")
    records = write_records(tmp_path / "records.jsonl", copy_records(8))
    config = FinetuneConfig(TrainerConfig(2, warmup=1), row_length=64, batch_rows=4, threads=asked)
    seen: list[int] = []
    finetune(base, records, tmp_path / "out", config, on_step=lambda *_: seen.append(torch.get_num_threads()))
    assert seen == [expected] * 2
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(("asked", "expected"), [(0, 1), (2, 2)])
def test_threads_of_a_checkpoint_that_answers(tmp_path: Path, asked: int, expected: int) -> None:
    torch.set_num_threads(3)
    base = write_checkpoint(tmp_path / "base")
    vocabulary = open_checkpoint(base).vocab_file
    assert vocabulary is not None
    engine = Engine(TorchBackend(load_model(base), 64, asked), Tokenizer.from_file(vocabulary))
    seen: list[int] = []
    engine.generate(
        {"input": "a", "<ans>": ""}, max_new_tokens=2, on_step=lambda _: seen.append(torch.get_num_threads())
    )
    assert engine.num_threads == expected
    assert set(seen) == {expected}
    assert torch.get_num_threads() == 3
