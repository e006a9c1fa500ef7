"""Change files at random, and see that reading them either works or says why not in one line, within little memory.

    python -m tests.mutated 2000

A kind of file is read in this process, under a limit on its memory.
"""

from __future__ import annotations

import json
import logging
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from cpmbee.errors import MAX_MESSAGE, CpmBeeError
from cpmbee.model import open_checkpoint, save_checkpoint
from cpmbee.tokenizer import Tokenizer
from cpmbee.train.data.build import build_dataset
from cpmbee.train.data.opening import open_dataset
from cpmbee.train.jsonl import JsonLines
from tests.model.factory import random_model, write_checkpoint
from tests.train.data.cases import PAYLOADS, RECORDS, pickled, write_dataset, write_legacy

MORE_MEMORY = 256 << 20  # bytes that reading a file of some kilobytes may take
_EXTREMES = (0, 1, -1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, -(1 << 63))
_NUMBERS = (b"-1", b"0", b"1e999", b"NaN", b"9" * 30, b"9" * 5000, b"null", b"[]", b'"\\ud800"', b"[" * 300, b"{}" * 9)


class Subject(NamedTuple):
    """A file that is changed, and what reads it."""

    file: Path
    read: Callable[[], object]


def subjects(folder: Path) -> dict[str, Subject]:
    """One of every kind of file that is read from a stranger."""

    def checkpoint(name: str, wrapped: bool = False, zipped: bool = True) -> Path:
        target = write_checkpoint(folder / name, random_model())
        state = random_model().state_dict()
        (target / "model.safetensors").unlink()
        saved = {"state_dict": state, "epoch": 3, "sizes": (1, 2.5, None)} if wrapped else state
        torch.save(saved, target / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return target

    def read_checkpoint(path: Path) -> Callable[[], object]:
        def read() -> None:
            opened = open_checkpoint(path)
            for name in opened.names():
                opened.read(name).tobytes()

        return read

    def records(path: Path) -> Callable[[], object]:
        return lambda: list(open_dataset(path))

    bins = {name: checkpoint(name, name == "wrapped", name != "old bin") for name in ("bin", "wrapped", "old bin")}
    safe = write_checkpoint(folder / "safe", random_model())
    sharded = folder / "sharded"
    save_checkpoint(random_model(), sharded, max_shard_bytes=5000)
    data = write_dataset(folder / "data", RECORDS)
    old = write_legacy(folder / "old", [PAYLOADS])
    pickles = write_legacy(folder / "pickles", [[pickled(record) for record in RECORDS]])
    lines = folder / "lines.jsonl"
    lines.write_bytes(b"\n".join(PAYLOADS))

    def shard() -> None:
        manifest = json.loads((data / "manifest.json").read_text(encoding="utf-8"))
        manifest["shards"][0]["size"] = (data / "shard-00000.arrow").stat().st_size
        (data / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        list(open_dataset(data))

    def built() -> None:
        with tempfile.TemporaryDirectory() as target:
            build_dataset(lines, Path(target) / "most", skip_bad=True)
            build_dataset(lines, Path(target) / "all")

    return {
        **{name: Subject(path / "pytorch_model.bin", read_checkpoint(path)) for name, path in bins.items()},
        "safetensors": Subject(safe / "model.safetensors", read_checkpoint(safe)),
        "config": Subject(safe / "config.json", read_checkpoint(safe)),
        "index": Subject(sharded / "model.safetensors.index.json", read_checkpoint(sharded)),
        "vocabulary": Subject(safe / "vocab.txt", lambda: Tokenizer.from_file(safe / "vocab.txt")),
        "manifest": Subject(data / "manifest.json", records(data)),
        "shard": Subject(data / "shard-00000.arrow", shard),
        "meta": Subject(old / "meta.bin", records(old)),
        "blocks": Subject(old / "data_0.bin", records(old)),
        "pickles": Subject(pickles / "data_0.bin", records(pickles)),
        "lines": Subject(lines, lambda: list(JsonLines(lines))),
        "build": Subject(lines, built),
    }


def mutate(content: bytes, draw: random.Random) -> bytes:
    """A content with one to four changes."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(changed) + 1)
        if draw.random() < 0.5:  # where structure is, rather than numbers
            places = [match.start() for match in re.finditer(rb"PK|[{}\[\]:,(.\x80XcKM]", bytes(changed))]
            at = draw.choice(places or [at])
        size = draw.choice((1, 1, 2, 4, 8, 64, 1000))
        match draw.randrange(7):
            case 0:
                changed[at : at + size] = draw.randbytes(size)
            case 1:
                width = draw.choice((1, 2, 4, 8))
                value = draw.choice(_EXTREMES) & ((1 << 8 * width) - 1)
                changed[at : at + width] = value.to_bytes(width, "little")
            case 2:
                del changed[at : at + size]
            case 3:
                changed[at:at] = changed[at : at + size] * draw.choice((1, 1, 9))
            case 4:
                del changed[at:]
            case 5:
                numbers = list(re.finditer(rb"\d+", bytes(changed)))
                if numbers:
                    found = draw.choice(numbers)
                    changed[found.start() : found.end()] = draw.choice(_NUMBERS)
            case 6:
                other = draw.randrange(len(changed) + 1)
                changed[at : at + size] = changed[other : other + size]
    return bytes(changed)


def read_mutated(subject: Subject, count: int, seed: int) -> Counter[str]:
    """How many of ``count`` changed files could be read and how many were refused.

    Raises:
        AssertionError: one was refused in another way; it stays where it is.
    """
    draw = random.Random(seed)
    content = subject.file.read_bytes()
    subject.read()
    results: Counter[str] = Counter()
    for number in range(count):
        subject.file.write_bytes(mutate(content, draw))
        said = None
        try:
            subject.read()
        except CpmBeeError as error:
            said = str(error)
        except Exception as error:
            raise AssertionError(f"seed {seed}, number {number}: {subject.file}: {error!r}") from error
        assert said is None or (said.isprintable() and len(said) <= MAX_MESSAGE), said
        results["read" if said is None else "refused"] += 1
    subject.file.write_bytes(content)
    return results


def limit_memory() -> None:
    """Let this process take `MORE_MEMORY` more than it has."""
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY, resource.RLIM_INFINITY))


def main(count: int, seed: int, kinds: list[str]) -> None:
    """Print what became of the files of each kind, a line of JSON each."""
    torch.set_num_threads(1)
    logging.disable()
    folder = Path(tempfile.mkdtemp())
    found = subjects(folder)
    limit_memory()
    for kind in kinds or found:
        begin = time.perf_counter()
        results = read_mutated(found[kind], count, seed)
        print(json.dumps({"kind": kind, **results, "seconds": round(time.perf_counter() - begin, 1)}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, sys.argv[3:])
