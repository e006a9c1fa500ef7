"""Data sets and mixtures that several test files build."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cpmbee.tokenizer import Tokenizer
from cpmbee.train.batches import TrainingBatch
from cpmbee.train.data.source import MixtureSource
from cpmbee.train.data.writer import new_dataset
from tests.engine.small_vocabulary import SPECIALS

LETTERS = "abcdefghijklmnopqrstuvwxyz"
BLOCK = 256  # bytes; the original's are 16 MiB
RECORDS = [{"input": "今天" * (i % 9), "<ans>": str(i)} for i in range(40)]
PAYLOADS = [json.dumps(record).encode() for record in RECORDS]


def tokenizer() -> Tokenizer:
    """Special tokens and letters."""
    return Tokenizer((*SPECIALS, *LETTERS))


def write_dataset(folder: Path, records: Iterable[Any], shard_bytes: int = 1 << 20) -> Path:
    """A data set of ours."""
    with new_dataset(folder, overwrite=False, shard_bytes=shard_bytes) as writer:
        for record in records:
            writer.write(record)
        writer.finish({})
    return folder


def write_mixture(path: Path, entries: Any) -> Path:
    """A mixture's file, replaced at once as editors do."""
    fresh = path.with_suffix(".new")
    fresh.write_text(entries if isinstance(entries, str) else json.dumps(entries), encoding="utf-8")
    fresh.replace(path)
    return path


def numbered(prefix: str, count: int) -> list[dict[str, str]]:
    """Records of different lengths that can be told apart."""
    return [{"input": prefix + LETTERS[i % 26] * (1 + i % 7), "<ans>": LETTERS[i // 26 % 26]} for i in range(count)]


def make_source(mixture: Path, **options: Any) -> MixtureSource:
    """A source with small rows."""
    return MixtureSource(mixture, tokenizer(), **{"row_length": 64, "batch_rows": 2, **options})


def take(source: MixtureSource, count: int) -> list[TrainingBatch]:
    """The next batches."""
    return [next(source) for _ in range(count)]


def same(left: TrainingBatch, right: TrainingBatch) -> bool:
    """Whether two batches are equal in every array."""
    return all((getattr(left, name) == getattr(right, name)).all() for name in vars(left))


def texts(batch: TrainingBatch) -> list[str]:
    """The samples of a batch as text, one string a span, row by row."""
    words = tokenizer()
    found = []
    for row in range(len(batch.input_ids)):
        used = int(batch.length[row])
        for span in range(int(batch.spans[row, :used].max()) + 1):
            inside = batch.spans[row, :used] == span
            found.append(words.decode(batch.input_ids[row, :used][inside].tolist()))
    return found


def write_legacy(folder: Path, payloads: Sequence[Sequence[bytes]], block: int = BLOCK, **fields: Any) -> Path:
    """A data set as the original tools write it, one file for each list of payloads."""
    folder.mkdir()
    lines = []
    begin = 0
    for number, records in enumerate(payloads):
        blocks = [b""]
        for payload in records:
            record = b"\x1f" + struct.pack("<I", len(payload)) + payload
            if len(blocks[-1]) + len(record) + 1 > block:
                blocks.append(b"")
            blocks[-1] += record
        (folder / f"data_{number}.bin").write_bytes(b"".join(part.ljust(block, b"\0") for part in blocks))
        meta = {
            "file_name": f"data_{number}.bin",
            "block_begin": begin,
            "block_end": begin + len(blocks),
            "nbytes": sum(4 + len(payload) for payload in records),
            "nlines": len(records),
            "mask": False,
            "block_size": block,
            **fields,
        }
        lines.append(json.dumps(meta))
        begin += len(blocks)
    (folder / "meta.bin").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


def pickled(value: Any, protocol: int = 4) -> bytes:
    """A pickle, as the original tools store records."""
    return pickle.dumps(value, protocol)
