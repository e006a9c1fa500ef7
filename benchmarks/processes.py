"""Measurements in processes of their own, and how quiet the machine was meanwhile.

No measurement inherits another's memory, threads or compiled state. One that others disturbed says so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

SAMPLE_SECONDS = 0.05
QUIET = 0.04  # share of the machine that others may use while a measurement counts as undisturbed
QUIET_SECONDS = 0.5  # without other processes before a measurement begins
LONGEST_WAIT = 10.0
LAST_SECONDS = 2.0  # that an interrupted process gets

T = TypeVar("T")


@dataclass
class Memory:
    """Bytes of memory of a process at most; None where the system does not tell.

    Attributes:
        resident: in memory, pages of mapped files included, by the system's own high-water mark.
        anonymous: of its own, as sampled; pages of mapped files are not counted.
        file: of mapped files, as sampled.
    """

    resident: int | None = None
    anonymous: int | None = None
    file: int | None = None

    def look(self, pid: int | str = "self") -> None:
        """Sample once."""
        status = memory_status(pid)
        self.include(Memory(status.get("VmHWM"), status.get("RssAnon"), status.get("RssFile")))

    def include(self, other: Memory) -> None:
        """Take the larger of each value."""
        self.resident = _larger(self.resident, other.resident)
        self.anonymous = _larger(self.anonymous, other.anonymous)
        self.file = _larger(self.file, other.file)


@dataclass(frozen=True)
class Outcome:
    """What a process printed and the memory it took.

    Attributes:
        output: all of its standard output.
        seconds: from its start to its end.
        memory: that it took.
    """

    output: str
    seconds: float
    memory: Memory

    @property
    def value(self) -> Any:
        """The JSON on the last line of output."""
        return json.loads(self.output.splitlines()[-1])


def run_module(module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> Outcome:
    """Run ``python -m module arguments`` and watch its memory; see `run_command`."""
    safe = {"PYTHONSAFEPATH": "1"}  # the current folder may hold anything, and is not looked at for imports
    return run_command([sys.executable, "-m", module, *arguments], {**safe, **(environment or {})})


def run_command(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Outcome:
    """Run a program and watch its memory.

    Args:
        command: program and arguments.
        environment: variables on top of those of this process.

    Raises:
        RuntimeError: it failed; with the end of what it wrote to its error output.
    """
    start = time.perf_counter()
    memory = Memory()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:  # pipes would fill up
        process = subprocess.Popen(
            command, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, stdout=output, stderr=errors
        )
        try:
            while process.poll() is None:
                memory.look(process.pid)
                time.sleep(SAMPLE_SECONDS)
        finally:
            if process.poll() is None:
                _end(process)
        seconds = time.perf_counter() - start
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(_why(process.returncode, errors.read().decode(errors="replace")))
        return Outcome(output.read().decode(), seconds, memory)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Give a process a moment to end what it started itself, then end it."""
    process.terminate()
    try:
        process.wait(LAST_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_children_on_sigterm() -> None:
    """Let a polite kill unwind this process, so that what it runs with `run_command` ends as well."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def _why(code: int, errors: str) -> str:
    """One line that says why a process failed."""
    if code == -signal.SIGKILL:
        return "killed by the system, most likely for lack of memory"
    lines = [line for line in errors.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"ended with code {code} and no message"


def undisturbed(work: Callable[[], T], attempts: int) -> tuple[T, float]:
    """Repeat ``work`` until nobody else used the machine meanwhile, at most ``attempts`` times.

    With more than one attempt each begins when the machine has come to rest, or has not for `LONGEST_WAIT`.

    Returns:
        What the least disturbed run returned, and the share of all cores' time that others took during it: other
        processes of this system, and other guests of the host as far as it tells.
    """
    runs: list[tuple[T, float]] = []
    for _ in range(attempts):
        if attempts > 1:
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
