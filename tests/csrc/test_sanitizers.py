"""The kernels, built with sanitizers, against the scalar reference on random problems."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.csrc.drivers import KERNELS, compile_in, driver_sources

COMPILER = os.environ.get("CXX") or shutil.which("g++")


def compile_with(sanitizer: str, sources: list[Path], program: Path) -> subprocess.CompletedProcess[str]:
    assert COMPILER is not None
    flags = ["-O1", "-g", "-fno-sanitize-recover=all", f"-fsanitize={sanitizer}"]
    return compile_in(program.parent, COMPILER, *flags, *sources, "-o", program)


@pytest.mark.skipif(COMPILER is None or platform.system() != "Linux", reason="needs g++ on Linux")
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_kernels_agree_under_the_sanitizer(sanitizer: str, kernels: str, tmp_path: Path) -> None:
    probe = tmp_path / "probe.cc"
    probe.write_text("int main() { return 0; }\n", encoding="utf-8")
    if (
        compile_with(sanitizer, [probe], tmp_path / "probe").returncode
        or subprocess.run([tmp_path / "probe"]).returncode
    ):
        pytest.skip(f"the libraries for -fsanitize={sanitizer} are not installed, or do not run here")

    driver = tmp_path / "driver"
    built = compile_with(sanitizer, driver_sources(kernels), driver)
    assert built.returncode == 0, built.stderr
    problems = "60" if sanitizer != "thread" else "15"
    result = subprocess.run([driver, "7", problems], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all agree" in result.stdout
