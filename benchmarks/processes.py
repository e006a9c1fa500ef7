"""Measurements in processes of their own, so that none inherits another's memory, threads or compiled state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT

SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Outcome:
    """What a process printed and the memory it took.

    Attributes:
        value: the JSON on its last line of output.
        peak_anonymous: bytes of memory of its own at most, as sampled; pages of mapped files are not counted. None
            where the system does not tell.
        peak_resident: bytes in memory at most, pages of mapped files included.
    """

    value: Any
    peak_anonymous: int | None
    peak_resident: int | None


def run_module(module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Outcome:
    """Run ``python -m module arguments`` and watch its memory.

    Raises:
        RuntimeError: it failed; with the end of what it wrote to its error output.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    anonymous: int | None = None
    resident: int | None = None
    while process.poll() is None:
        status = memory_status(process.pid)
        anonymous = _larger(anonymous, status.get("RssAnon"))
        resident = _larger(resident, status.get("VmHWM"))
        time.sleep(SAMPLE_SECONDS)
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed: {errors[-2000:]}")
    return Outcome(json.loads(output.splitlines()[-1]), anonymous, resident)


def memory_status(pid: int | str = "self") -> dict[str, int]:
    """The memory lines of ``/proc/PID/status`` in bytes; empty where there is no such file."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines if line.endswith(" kB"))
    return {name: 1024 * int(value.split()[0]) for name, _, value in pairs}


def _larger(known: int | None, seen: int | None) -> int | None:
    return known if seen is None else max(known or 0, seen)
