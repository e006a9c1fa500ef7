"""The Makefile where there is no repository, as in a release."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """What a release has, all of it written long ago."""
    for name in ("Makefile", "setup.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    left_out = shutil.ignore_patterns("results", "__pycache__", "*.so", "*.c")
    for name in ("engine", "model", "train", "export", "benchmarks", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=left_out)
    for path in tmp_path.rglob("*"):
        os.utime(path, (1e9, 1e9), follow_symlinks=False)
    return tmp_path


def planned(folder: Path, target: str) -> str:
    make = str(shutil.which("make"))
    done = subprocess.run([make, "-n", target], cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return done.stdout


def test_a_demo_is_installed_first(release: Path) -> None:
    plan = planned(release, "demo")
    assert plan.index("pip install") < plan.index("cpmbee demo")


@pytest.mark.parametrize(("stamp", "target"), [(".venv/demo", "demo"), (".venv-dev/installed", "check")])
def test_what_has_changed_is_installed_again(release: Path, stamp: str, target: str) -> None:
    (release / stamp).parent.mkdir()
    (release / stamp).touch()
    os.utime(release / stamp, (1.1e9, 1.1e9))
    assert "pip install" not in planned(release, target)
    for changed in (
        "engine/engine.py",
        "csrc/prompt.pyx",
        "csrc/attention_avx2.cc",
        "model/demo/vocab.txt",
        "setup.py",
    ):
        os.utime(release / changed, (1.2e9, 1.2e9))
        assert "pip install" in planned(release, target), changed
        os.utime(release / changed, (1e9, 1e9))
