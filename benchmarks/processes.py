"""Measurements in processes of their own, and how quiet the machine was meanwhile.

No measurement inherits another's memory, threads or compiled state. One that others disturbed says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cpmbee.bench.environment import ROOT

SAMPLE_SECONDS = 0.05
QUIET = 0.04  # share of the machine that others may use while a measurement counts as undisturbed
QUIET_SECONDS = 0.5  # without other processes before a measurement begins
LONGEST_WAIT = 20.0

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """What a process printed and the memory it took.

    Attributes:
        output: all of its standard output.
        seconds: from its start to its end.
        peak_anonymous: bytes of memory of its own at most, as sampled; pages of mapped files are not counted. None
            where the system does not tell.
        peak_resident: bytes in memory at most, pages of mapped files included.
    """

    output: str
    seconds: float
    peak_anonymous: int | None
    peak_resident: int | None

    @property
    def value(self) -> Any:
        """The JSON on the last line of output."""
        return json.loads(self.output.splitlines()[-1])


def run_module(module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Outcome:
    """Run ``python -m module arguments`` and watch its memory.

    Raises:
        RuntimeError: it failed; with the end of what it wrote to its error output.
    """
    start = time.perf_counter()
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
    seconds = time.perf_counter() - start
    output, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed: {errors[-2000:]}")
    return Outcome(output, seconds, anonymous, resident)


def undisturbed(work: Callable[[], T], attempts: int) -> tuple[T, float]:
    """Repeat ``work`` until nobody else used the machine meanwhile, at most ``attempts`` times.

    Returns:
        What the least disturbed run returned, and the share of all cores' time that others took during it: other
        processes of this system, and other guests of the host as far as it tells.
    """
    runs: list[tuple[T, float]] = []
    for _ in range(attempts):
        _wait_for_quiet()
        busy, own, start = _busy_seconds(), _own_seconds(), time.perf_counter()
        value = work()
        elapsed = (time.perf_counter() - start) * (os.cpu_count() or 1)
        others = (_busy_seconds() - busy) - (_own_seconds() - own)
        runs.append((value, max(0.0, others / elapsed)))
        if runs[-1][1] <= QUIET:
            break
    return min(runs, key=lambda run: run[1])


def _wait_for_quiet() -> None:
    """Wait, though not for long, until the processors have had nothing to do for a moment."""
    give_up = time.perf_counter() + LONGEST_WAIT
    while time.perf_counter() < give_up:
        busy, start = _busy_seconds(), time.perf_counter()
        time.sleep(QUIET_SECONDS)
        if _busy_seconds() - busy <= QUIET * (time.perf_counter() - start) * (os.cpu_count() or 1):
            return


def _busy_seconds() -> float:
    """Processor time that anybody took since the system started, time that the host kept for others included."""
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
    except OSError:
        return _own_seconds()
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    return float(user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Processor time of this process and of all that it started and has waited for."""
    return sum(os.times()[:4])


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
