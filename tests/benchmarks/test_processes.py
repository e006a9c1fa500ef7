"""Memory and bandwidth as measured here, beside what the system and a program in C say."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from cpmbee.bench.bandwidth import read_bandwidth
from cpmbee.bench.processes import Memory, run_command, run_module
from cpmbee.machine import physical_cores

T = TypeVar("T")
TAKEN = 150 << 20
HOG = f"import time; taken = bytearray(b'x') * {TAKEN}; time.sleep(0.4)"
LAUNCHER = (  # a small process in between: a child's accounting begins with the size of whoever started it
    "import resource, subprocess, sys\n"
    "subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)\n"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_peak_memory_is_what_the_system_accounts() -> None:
    memory = run_command([sys.executable, "-c", HOG]).memory
    command = [sys.executable, "-c", LAUNCHER, HOG]
    accounted = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert memory.resident == pytest.approx(accounted, rel=0.03)
    assert memory.anonymous is not None
    assert memory.file is not None
    assert TAKEN < memory.anonymous < memory.resident
    assert 0 < memory.file < 100 << 20


def test_failures_say_why() -> None:
    with pytest.raises(RuntimeError, match="ValueError: no good"):
        run_command([sys.executable, "-c", "raise ValueError('no good')"])
    with pytest.raises(RuntimeError, match="lack of memory"):
        run_command([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_runs_on_after_an_interruption(tmp_path: Path, number: signal.Signals) -> None:
    inner = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    middle = (
        "import sys; from cpmbee.bench.processes import end_children_on_sigterm, run_command\n"
        f"end_children_on_sigterm(); run_command([sys.executable, '-c', {inner!r}])"
    )
    outer = (
        "import signal, sys; from cpmbee.bench.processes import end_children_on_sigterm, run_command\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
        f"end_children_on_sigterm(); run_command([sys.executable, '-c', {middle!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", outer], stderr=subprocess.DEVNULL)
    pid = wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    process.send_signal(number)  # to it alone, where a terminal would tell all of them
    process.wait(20)
    assert wait_for(lambda: not Path(f"/proc/{pid}").exists())


def wait_for(found: Callable[[], T]) -> T:
    for _ in range(400):
        if value := found():
            return value
        time.sleep(0.05)
    return found()


def test_modules_are_not_looked_for_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "argparse.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    if sys.version_info >= (3, 11):
        assert "usage" in run_module("cpmbee.bench.bandwidth", ["--help"]).output


def test_the_larger_of_two_memories_counts() -> None:
    memory = Memory(5, None, 7)
    memory.include(Memory(3, 4, None))
    assert memory == Memory(5, 4, 7)


def test_bandwidth_is_that_of_a_program_in_c(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    program = tmp_path / "stream"
    source = Path(__file__).with_name("stream_read.c")
    subprocess.run([compiler, "-O3", "-march=native", "-pthread", source, "-o", program], check=True)
    threads = physical_cores()
    ratios = []
    for _ in range(4):  # others may use the machine meanwhile; they have to leave it alone once
        ours = read_bandwidth(threads)
        output = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True).stdout
        ratios.append(ours / float(output.split()[1]))
        if ratios[-1] == pytest.approx(1, abs=0.1):
            return
    if os.getloadavg()[0] > threads:
        pytest.skip(f"the machine is busy: ratios {ratios}")
    pytest.fail(f"NumPy's rate over that of C: {ratios}")
