"""The example of 24 records in the documentation: it runs as printed, and the model learns all of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cpmbee.bench.small_finetune import records

ROOT = Path(__file__).resolve().parents[2]
LORA = " --lora-rank 8"


@pytest.fixture
def page() -> str:
    return (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8").partition("## Example: 24 records")[2]


def run_in(folder: Path, commands: str) -> list[str]:
    """What a shell prints, in a folder that looks like a source tree, for commands that call `cpmbee` and `python`."""
    (folder / "model").symlink_to(ROOT / "model")
    (folder / "bin").mkdir()
    entry = "import sys; from cpmbee.cli import main; sys.exit(main())"
    for name, options in (("python", ""), ("cpmbee", f" -c '{entry}'")):
        file = folder / "bin" / name
        file.write_text(f'#!/bin/sh\nexec {sys.executable}{options} "$@"\n')
        file.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["bash", "-euo", "pipefail", "-c", commands]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_adapters_learn_it(page: str, tmp_path: Path) -> None:
    commands, shown = re.findall(r"```(?:sh)?\n(.*?)```", page, re.DOTALL)[:2]
    seconds = re.compile(r"in \d+ s")
    printed = [seconds.sub("in some s", line) for line in run_in(tmp_path, commands)]
    assert printed == seconds.sub("in some s", shown).splitlines()
    assert printed[-1] == '  "exact_match": 1.0,'
    lines = (tmp_path / "terms.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == records()


@pytest.mark.slow
def test_all_parameters_learn_it(page: str, tmp_path: Path) -> None:
    commands = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)[0]
    assert LORA in commands
    commands = commands.replace(LORA, "").replace(
        "model/demo terms.jsonl --lora terms/delta", "terms/model terms.jsonl"
    )
    printed = run_in(tmp_path, commands)
    assert (printed[0], printed[-1]) == ('  "exact_match": 0.0,', '  "exact_match": 1.0,')
