"""The rooms of the project and the arrows between them: who may import whom, and what `import cpmbee` may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "engine": "cpmbee",
    "model": "cpmbee.model",
    "train": "cpmbee.train",
    "export": "cpmbee.export",
    "benchmarks": "cpmbee.bench",
}
MAY_IMPORT = {
    "engine": {"engine"},
    "model": {"model", "engine"},
    "train": {"train", "model", "engine"},
    "export": {"export", "model", "engine"},
    "benchmarks": {"benchmarks", "export", "train", "model", "engine"},
}
THIRD_PARTY = {"engine": {"numpy", "onnxruntime"}}


def room_of(module: str) -> str | None:
    """The room a dotted module name lives in, or None outside the project."""
    if module != "cpmbee" and not module.startswith("cpmbee."):
        return None
    for room in ("model", "train", "export", "benchmarks"):
        if module == ROOMS[room] or module.startswith(ROOMS[room] + "."):
            return room
    return "engine"


def imported_modules(source: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}: relative import"
            # `from cpmbee import model` names a room, too
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_between_rooms(room: str) -> None:
    sources = sorted((ROOT / room).rglob("*.py"))
    assert sources
    for source in sources:
        for module in imported_modules(source):
            target = room_of(module)
            assert target is None or target in MAY_IMPORT[room], f"{source.relative_to(ROOT)} imports {module}"


def test_engine_needs_numpy_and_onnxruntime_only() -> None:
    for source in sorted((ROOT / "engine").rglob("*.py")):
        for module in imported_modules(source):
            top = module.partition(".")[0]
            allowed = top == "cpmbee" or top in sys.stdlib_module_names or top in THIRD_PARTY["engine"]
            assert allowed, f"{source.relative_to(ROOT)} imports {module}"


def test_import_is_light() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxruntime', 'safetensors'): sys.modules[name] = None\n"
        "import cpmbee\n"
        "assert {n for n in cpmbee.__all__ if getattr(cpmbee, n) is None} == set()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


@pytest.mark.parametrize("package", ["cpmbee.model", "cpmbee.export"])
def test_torch_is_optional(package: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; import {package}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_files_stay_short() -> None:
    for pattern in ("*.py", "*.pyx", "*.cc", "*.h"):
        for source in ROOT.rglob(pattern):
            if source.relative_to(ROOT).parts[0] in {*ROOMS, "csrc", "tests"}:
                lines = len(source.read_text(encoding="utf-8").splitlines())
                assert lines <= 500, f"{source.relative_to(ROOT)} has {lines} lines"
