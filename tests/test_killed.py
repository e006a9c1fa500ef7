"""A few kills of each command that replaces something; ``python -m tests.killed 200`` does many."""

from pathlib import Path

import pytest
import torch

from tests.killed import killed, targets


@pytest.mark.parametrize("name", ["export", "merge", "data build", "finetune", "finetune, LoRA", "pretrain"])
def test_what_a_killed_command_replaces_still_opens(tmp_path: Path, name: str) -> None:
    torch.set_num_threads(1)
    found = killed(targets(tmp_path)[name], 2, tmp_path / "runs", seed=3)
    assert found["old"] + found["new"] == 2
