"""Time and memory of an export and its verification, in a process of its own.

    python -m cpmbee.bench.export_cost NAME CHECKPOINT OUT [options of cpmbee export]

Peak memory is what the process has of its own: pages of mapped files (the checkpoint) come and go as the system likes.
The result goes to ``benchmarks/results/NAME.json``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cpmbee import cli
from cpmbee.bench.environment import write_result
from cpmbee.bench.processes import run_module

CHILD = "--run"  # the process that is watched: runs the rest of the command line


def main() -> None:
    """Export, print what it took, keep the result."""
    if sys.argv[1:2] == [CHILD]:
        raise SystemExit(cli.main(sys.argv[2:]))
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    name, checkpoint, out, *options = sys.argv[1:]
    outcome = run_module("cpmbee.bench.export_cost", [CHILD, "export", checkpoint, out, *options])
    weights = [file for file in Path(checkpoint).iterdir() if file.suffix in (".safetensors", ".bin", ".pt")]
    result = {
        "checkpoint_bytes": sum(file.stat().st_size for file in weights),
        "exported_bytes": sum(file.stat().st_size for file in Path(out).iterdir()),
        "options": options,
        "seconds": round(outcome.seconds, 1),
        "cpu_seconds": round(processor_seconds(), 1),
        "peak_anonymous_bytes": outcome.memory.anonymous,
        "peak_resident_bytes": outcome.memory.resident,
        "output": outcome.output.replace(out, Path(out).name).splitlines(),
    }
    print(outcome.output)
    own = (outcome.memory.anonymous or 0) / 1e9
    print(f"{outcome.seconds:.1f} s, peak memory {own:.2f} GB; kept in {write_result(name, result)}")


def processor_seconds() -> float:
    """Time on all cores that the watched process took: unlike the clock's, it does not depend on others."""
    times = os.times()
    return times.children_user + times.children_system


if __name__ == "__main__":
    main()
