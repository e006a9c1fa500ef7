"""The programs that compare kernels with the scalar reference on random problems, and how they are compiled."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("attention", "quantized", "row")  # one driver each
FLAGS = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-pthread"]
ONNX_RUNTIME_SIDE = ("quantized_linear.cc", "quantized_embedding.cc")  # need the runtime; the kernels do not


def driver_sources(kernels: str) -> list[Path]:
    """What the driver of these kernels is made of."""
    csrc = ROOT / "csrc"
    sources = [path for path in sorted(csrc.glob(f"{kernels}_*.cc")) if path.name not in ONNX_RUNTIME_SIDE]
    return [ROOT / "tests" / "csrc" / f"{kernels}_driver.cc", *sources, csrc / "cpu.cc"]


def compile_in(folder: Path, compiler: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the compiler there; whether it was content is in the result."""
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'csrc'}"]
    return subprocess.run([compiler, *FLAGS, *includes, *arguments], cwd=folder, capture_output=True, text=True)
