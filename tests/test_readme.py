"""The README's snippets, run as they stand and in their order, in a folder that looks like a release.

What is not run: ``make test``, which runs this; ``make demo``, for whose last step ``cpmbee demo`` stands; lines of
``pip install``, which are compared with the metadata.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SLOW_SECTIONS = {"Train", "Benchmark it on your machine"}  # take minutes
STAND_INS = [(r"^make demo\b", "cpmbee demo"), (r"^make test\b", ":"), (r"^pip install\b", ":")]


def snippets() -> list[tuple[str, str, str]]:
    """Section, language and text of every code block, in order."""
    found: list[tuple[str, str, str]] = []
    section = ""
    for heading, language, text in re.findall(r"^## ([^\n]+)$|^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        section = heading or section
        if not heading:
            found.append((section, language, text))
    return found


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what a release has, and the command on the path."""
    folder, binaries = tmp_path / "cpmbee", tmp_path / "bin"
    folder.mkdir()
    binaries.mkdir()
    for name in ("model", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    command = binaries / "cpmbee"
    command.write_text(f"#!{sys.executable}\nimport sys\nfrom cpmbee.cli import main\nsys.exit(main())\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{os.environ['PATH']}")
    monkeypatch.chdir(folder)
    return folder


def run_snippets(sections: set[str] | None = None) -> None:
    """Run the snippets of some sections, or all, one after the other."""
    names: dict[str, Any] = {}
    for section, language, text in snippets():
        if sections is not None and section not in sections:
            continue
        if language == "python":
            exec(compile(text, f"README.md, {section}", "exec"), names)  # noqa: S102
            continue
        assert language == "sh", f"{section}: what is a snippet in {language or 'no language'}?"
        for pattern, stand_in in STAND_INS:
            text = re.sub(pattern, stand_in, text, flags=re.MULTILINE)
        done = subprocess.run(
            ["/bin/bash", "-euo", "pipefail", "-c", text], capture_output=True, text=True, timeout=900, check=False
        )
        assert done.returncode == 0, f"{section}:\n{text}\n{done.stdout}\n{done.stderr}"


def test_there_are_snippets_of_everything() -> None:
    sections = [section for section, _, _ in snippets()]
    assert sections[0] == "Two commands"
    assert set(sections) >= SLOW_SECTIONS | {"Embed it", "Ask from the command line", "Export your checkpoint"}


def test_the_snippets_run(release: Path) -> None:
    run_snippets({section for section, _, _ in snippets()} - SLOW_SECTIONS)
    answers = (release / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers) == len((ROOT / "model/demo/requests.jsonl").read_text(encoding="utf-8").splitlines())


@pytest.mark.slow
def test_all_snippets_run_in_order(release: Path) -> None:
    run_snippets()
    assert (release / "merged" / "config.json").is_file()
    assert (release / "run" / "model").is_dir()


def test_what_pip_is_told_to_install_exists() -> None:
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = metadata.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", table, re.MULTILINE))
    lines = re.findall(r"^pip install (.+?)(?: +#.*)?$", README, re.MULTILINE)
    assert lines
    for line in lines:
        target = re.fullmatch(r'"\.\[([\w,]+)\]"', line)
        assert target, line
        assert set(target[1].split(",")) <= extras


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "model" / "demo" / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"
