"""The library and its kernels for 64-bit ARM: cross-compiled, and run by an emulator.

On an ARM machine the other tests of this folder cover the same kernels.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.drivers import KERNELS, ROOT, compile_in

COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
PROCESSORS = {"cortex-a72": "neon", "neoverse-n1": "neon-dotprod"}  # without dot products, and with

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs aarch64-linux-gnu-g++ (g++-aarch64-linux-gnu)")
needs_emulator = pytest.mark.skipif(EMULATOR is None, reason="needs qemu-aarch64 (Debian's qemu-user)")


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The library's sources, compiled."""
    assert COMPILER is not None
    folder = tmp_path_factory.mktemp("objects")
    sources = sorted((ROOT / "csrc").glob("*.cc"))
    compiled = compile_in(folder, COMPILER, "-c", "-O2", "-fPIC", "-fvisibility=hidden", *sources)
    assert compiled.returncode == 0, compiled.stderr
    return sorted(folder.glob("*.o"))


@needs_compiler
def test_the_library_needs_nothing_that_only_other_machines_have(objects: list[Path], tmp_path: Path) -> None:
    assert COMPILER is not None
    linked = compile_in(tmp_path, COMPILER, "-shared", "-Wl,-z,defs", *objects, "-o", "ops.so")
    assert linked.returncode == 0, linked.stderr


@needs_compiler
@needs_emulator
@pytest.mark.parametrize("kernels", KERNELS)
def test_kernels_agree_with_the_reference(kernels: str, objects: list[Path], tmp_path: Path) -> None:
    assert COMPILER is not None
    assert EMULATOR is not None
    driver = tmp_path / "driver"
    source = ROOT / "tests" / "csrc" / f"{kernels}_driver.cc"
    built = compile_in(tmp_path, COMPILER, "-O2", "-static", source, *objects, "-o", driver)
    assert built.returncode == 0, built.stderr
    for processor, best in PROCESSORS.items():
        result = subprocess.run([EMULATOR, "-cpu", processor, driver, "7", "15"], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        assert f"up to {best if kernels == 'quantized' else 'neon'}" in result.stdout
