"""A few kills of each command that replaces something; ``python -m tests.killed 200`` does many."""

from pathlib import Path

import pytest
import torch

from tests.killed import Target, killed, targets


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    torch.set_num_threads(1)
    return targets(tmp_path_factory.mktemp("given"))


@pytest.mark.parametrize("name", ["export", "merge", "data build", "finetune", "finetune, LoRA", "pretrain"])
def test_what_a_killed_command_replaces_still_opens(commands: dict[str, Target], tmp_path: Path, name: str) -> None:
    found = killed(commands[name], 2, tmp_path / "runs", seed=3)
    assert found["old"] + found["new"] == 2
