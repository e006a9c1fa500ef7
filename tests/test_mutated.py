"""Some changed files of every kind; ``python -m tests.mutated 2000`` tries many."""

import json
import subprocess
import sys


def test_changed_files_are_read_or_refused_in_one_line() -> None:
    """In a process of its own: a crash or a hang fails here as well, and its memory is limited."""
    command = [sys.executable, "-m", "tests.mutated", "40", "7"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(results) == 14
    assert all(result.get("refused", 0) > 3 for result in results), results
