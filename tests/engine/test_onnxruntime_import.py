"""Importing ONNX Runtime: nothing is reported, and what is wrong with an installation is said."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

import cpmbee
from cpmbee import onnxruntime_import
from cpmbee.onnxruntime_import import NO_TELEMETRY, import_onnxruntime

ROOT = Path(__file__).resolve().parents[2]
REPORTS_SINCE = (1, 29)
NUMPY_ERROR = """
try:
    raise AttributeError("_ARRAY_API not found")
except AttributeError as error:
    raise ImportError from error
"""


def run(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with nothing in its environment that ONNX Runtime looks at."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True)


def test_nothing_is_left_in_the_home_folder(small_folder: Path, tmp_path: Path) -> None:
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < REPORTS_SINCE:
        pytest.skip("this ONNX Runtime reports nothing")
    code = (
        "import sys, cpmbee\n"
        "engine = cpmbee.Engine.from_pretrained(sys.argv[1])\n"
        "engine.generate({'input': 'a', '<ans>': ''}, max_new_tokens=2)\n"
    )
    run(code, str(small_folder), HOME=str(tmp_path)).check_returncode()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("given", "then"), [({}, "1"), ({NO_TELEMETRY: "0"}, "0"), ({NO_TELEMETRY: ""}, "")])
def test_what_the_environment_says_stays(given: dict[str, str], then: str) -> None:
    code = f"""
        import os
        from cpmbee.onnxruntime_import import import_onnxruntime
        import_onnxruntime()
        print(os.environ[{NO_TELEMETRY!r}], end="")
    """
    assert run("if True:" + code, **{"HOME": os.devnull, **given}).stdout == then


def test_nothing_else_imports_it() -> None:
    """Another import would come too late to be told not to report; for annotations it may be named."""
    for room in ("engine", "model", "train", "export", "benchmarks"):
        for source in (ROOT / room).rglob("*.py"):
            tree = ast.parse(source.read_text(encoding="utf-8"))
            unused = {
                id(inner)
                for node in ast.walk(tree)
                if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
                for statement in node.body
                for inner in ast.walk(statement)
            }
            for node in ast.walk(tree):
                if id(node) in unused or source.name == "onnxruntime_import.py":
                    continue
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                found = [name for name in names if name.partition(".")[0] == "onnxruntime"]
                assert not found, f"{source.relative_to(ROOT)}:{node.lineno} imports {found[0]}"


def test_both_runtimes_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_import, "_version", lambda name: "1.32.0")
    with pytest.raises(cpmbee.DependencyError, match="both installed"):
        import_onnxruntime()


def test_no_runtime(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'is missing; pip install "cpmbee\[cpu\]" brings it$'):
        cpmbee.Engine.from_pretrained(small_folder)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (NUMPY_ERROR, r"imported: ImportError, because of AttributeError \(_ARRAY_API not found\); installed are .*"),
        ("raise ImportError", r"imported: ImportError; installed are .*"),
        ("import no_such_module", r"imported: ModuleNotFoundError \(No module named 'no_such_module'\); .*"),
        ("raise OSError('libgomp.so.1: cannot open\\nmore')", r"imported: OSError \(libgomp\.so\.1: cannot open\); .*"),
    ],
)
def test_one_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, reason: str) -> None:
    import_broken(tmp_path, monkeypatch, source)
    with pytest.raises(cpmbee.DependencyError, match=f"^ONNX Runtime cannot be {reason}$") as caught:
        import_onnxruntime()
    assert "pip install" not in str(caught.value)


def test_one_built_for_another_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_broken(tmp_path, monkeypatch, "raise ImportError")
    monkeypatch.setattr(onnxruntime_import, "_version", {"onnxruntime": "1.18.1"}.get)
    monkeypatch.setattr("numpy.__version__", "2.1.0")
    with pytest.raises(cpmbee.DependencyError, match=r'onnxruntime 1\.18\.1 and NumPy 2\.1\.0, .*"numpy<2"$'):
        import_onnxruntime()
    monkeypatch.setattr("numpy.__version__", "1.26.4")
    with pytest.raises(cpmbee.DependencyError, match=r"NumPy 1\.26\.4$"):
        import_onnxruntime()


def test_an_interrupt_of_the_import_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_broken(tmp_path, monkeypatch, NUMPY_ERROR.replace("AttributeError", "KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        import_onnxruntime()


def import_broken(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    """Put a package called onnxruntime in front whose import does what ``source`` says."""
    package = folder / "onnxruntime"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    for name in [name for name in sys.modules if name.partition(".")[0] == "onnxruntime"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(folder)
