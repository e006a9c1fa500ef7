"""The kernels, built with sanitizers, against the scalar reference on random problems."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("g++")
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fno-sanitize-recover=all", "-pthread"]
ONNX_RUNTIME_SIDE = ("quantized_linear.cc", "quantized_embedding.cc")  # need the runtime; the kernels do not


def compile_with(sanitizer: str, sources: list[Path], program: Path) -> subprocess.CompletedProcess[str]:
    assert COMPILER is not None
    command = [
        COMPILER,
        *FLAGS,
        f"-fsanitize={sanitizer}",
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'tests' / 'csrc'}",
        *map(str, sources),
        "-o",
        str(program),
    ]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(COMPILER is None or platform.system() != "Linux", reason="needs g++ on Linux")
@pytest.mark.parametrize("kernels", ["attention", "quantized", "row"])
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
    sources = [path for path in sorted((ROOT / "csrc").glob(f"{kernels}_*.cc")) if path.name not in ONNX_RUNTIME_SIDE]
    main = ROOT / "tests" / "csrc" / f"{kernels}_driver.cc"
    built = compile_with(sanitizer, [main, *sources, ROOT / "csrc" / "cpu.cc"], driver)
    assert built.returncode == 0, built.stderr
    problems = "60" if sanitizer != "thread" else "15"
    result = subprocess.run([driver, "7", problems], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all agree" in result.stdout
