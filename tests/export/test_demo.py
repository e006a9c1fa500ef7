"""The demo: what it says at its end works when it is typed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cpmbee.export import demo


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``bin/cpmbee`` as pip writes it."""
    folder = tmp_path_factory.mktemp("a folder")
    command = folder / ".venv" / "bin" / "cpmbee"
    command.parent.mkdir(parents=True)
    command.write_text(f"#!{sys.executable}\nimport sys\nfrom cpmbee.cli import main\nsys.exit(main())\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    return folder


def shell(line: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        ["/bin/bash", "-c", line],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        timeout=120,
        check=True,
    )
    return done.stdout.decode("utf-8")


@pytest.mark.parametrize(
    ("out", "settings"),
    [
        ("demo-model", {}),
        ("it's a $HOME model", {}),
        ("m d", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    ],
)
def test_the_last_line_can_be_typed(environment: Path, out: str, settings: dict[str, str]) -> None:
    quoted = out.replace("'", "'\\''")
    printed = shell(f".venv/bin/cpmbee demo --out '{quoted}'", environment, **settings)
    assert "白发三千丈" in printed
    *_, heading, line = printed.splitlines()
    assert heading == "now yours:"
    assert line.startswith("  .venv/bin/cpmbee generate ")
    assert '"answer": "白髮三千丈"' in shell(line, environment)


def test_a_command_on_the_path_is_called_by_its_name(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = environment / ".venv" / "bin" / "cpmbee"
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert demo._own_command() == [str(script)]
    monkeypatch.setenv("PATH", str(script.parent))
    assert demo._own_command() == ["cpmbee"]
    monkeypatch.setattr(sys, "argv", [str(Path(demo.__file__).parent / "__main__.py")])
    assert demo._own_command() == [sys.executable, "-m", "cpmbee"]
