"""The command line and what lies at the other end of its pipes: readers that leave, full disks, devices, encodings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

REQUEST = '{"input": "今天天气真好", "<ans>": ""}'


def run(arguments: list[str], shell: str = '"$@"', **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command in a process of its own; ``shell`` says how its streams are connected."""
    code = "import sys; from cpmbee.cli import main; sys.exit(main())"
    return subprocess.run(
        ["/bin/bash", "-o", "pipefail", "-c", shell, "bash", sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"]])
def test_a_reader_that_has_left(arguments: list[str]) -> None:
    done = run(arguments, '(sleep 0.2; exec "$@") | true')
    assert done.returncode in (0, 1)  # argparse does not mind
    assert done.stderr == b""


def test_a_reader_that_leaves(small_folder: Path, tmp_path: Path) -> None:
    requests = tmp_path / "in.jsonl"
    requests.write_text(f"{REQUEST}\n" * 300, encoding="utf-8")
    arguments = ["generate", str(small_folder), str(requests), "--max-new-tokens", "2", "--batch-size", "1"]
    done = run(arguments, '"$@" | head -n 1')
    assert (done.returncode, done.stderr) == (1, b"")
    assert done.stdout.count(b"\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(small_folder: Path) -> None:
    for arguments in (["--help"], ["generate", str(small_folder), REQUEST]):
        done = run(arguments, '"$@" > /dev/full')
        assert (done.returncode, done.stderr) == (1, b"cpmbee: No space left on device\n")


def test_closed_streams(small_folder: Path) -> None:
    assert run(["generate", str(small_folder), REQUEST], '"$@" >&- 2>&-').returncode == 0
    done = run(["generate", str(small_folder)], '"$@" <&-')
    assert done.returncode == 1
    assert done.stderr == b"cpmbee: standard input is closed; give a request or a file\n"


def test_text_that_the_output_cannot_encode(small_folder: Path) -> None:
    # Every token is as likely as any other, so the lone surrogate of the request comes in one of the answers.
    answers = ", ".join(f'"{i}": ""' for i in range(20))
    request = f'{{"input": "<x\\ud800>", "<ans>": {{{answers}}}}}'
    options = ["--temperature", "10000", "--seed", "1", "--max-new-tokens", "300"]
    for encoding in ("utf-8", "ascii"):
        done = run(["generate", str(small_folder), request, *options], PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr) == (0, b"")
        assert any("\ud800" in (text or "") for text in json.loads(done.stdout)["answer"].values())
        assert run(["generate", str(small_folder), request, *options, "--stream"]).returncode == 0


def test_a_pipe_as_output_is_written_to_not_replaced(small_folder: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text(encoding="utf-8")), daemon=True)
    reader.start()
    assert run(["generate", str(small_folder), REQUEST, "--output", str(pipe)]).returncode == 0
    reader.join(10)
    assert "answer" in json.loads(got[0])
    assert pipe.is_fifo()


def test_a_folder_or_link_as_output(small_folder: Path, tmp_path: Path) -> None:
    done = run(["generate", str(small_folder), REQUEST, "--output", str(tmp_path)])
    assert done.returncode == 1
    assert done.stderr.decode() == f"cpmbee: {tmp_path}: is a folder\n"
    target, link = tmp_path / "target.jsonl", tmp_path / "link.jsonl"
    target.write_text("old", encoding="utf-8")
    link.symlink_to(target)
    assert run(["generate", str(small_folder), REQUEST, "--output", str(link)]).returncode == 0
    assert link.is_symlink()
    assert "answer" in json.loads(target.read_text(encoding="utf-8"))


def test_a_request_that_does_not_fit_the_cache_is_named(small_folder: Path, tmp_path: Path) -> None:
    requests = tmp_path / "in.jsonl"
    long = json.dumps({"input": "a" * 500, "<ans>": ""})
    requests.write_text(f"{REQUEST}\n{long}\n", encoding="utf-8")
    done = run(["generate", str(small_folder), str(requests), "--cache-tokens", "300"])
    assert done.returncode == 1
    assert done.stderr.startswith(f"cpmbee: {requests}, line 2: the request needs".encode())
