"""Checkpoints made to hurt: what would unfold, repeat or reach out of its file is refused before memory is taken."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cpmbee.errors import CheckpointError
from cpmbee.model.pickle_machine import MAX_INSTRUCTIONS
from cpmbee.model.tensor_files import open_tensor_file
from cpmbee.model.torch_file import MAX_PICKLE_BYTES

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.float16)}


def save(path: Path, state: Any = None, **options: Any) -> Path:
    torch.save(STATE if state is None else state, path, **options)
    return path


def repacked(path: Path, change: Callable[[dict[str, bytes]], None], method: int = zipfile.ZIP_STORED) -> Path:
    """The records of a saved file, changed, as another archive."""
    with zipfile.ZipFile(save(path)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return path


def refused(path: Path, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_tensor_file(path)
    assert str(caught.value).isprintable()


def pickled(program: bytes) -> Callable[[dict[str, bytes]], None]:
    """Puts a program in the place of an archive's pickle."""

    def change(records: dict[str, bytes]) -> None:
        (name,) = [name for name in records if name.endswith("data.pkl")]
        records[name] = b"\x80\x02" + program + b"."

    return change


def test_archives_of_other_writers_open_if_they_store(tmp_path: Path) -> None:
    file = open_tensor_file(repacked(tmp_path / "a.bin", lambda _: None))
    assert file.read("a").tolist() == STATE["a"].tolist()
    refused(repacked(tmp_path / "b.bin", lambda _: None, zipfile.ZIP_DEFLATED), r"its record \S+ is compressed")


def test_records_that_lie_on_each_other(tmp_path: Path) -> None:
    path = save(tmp_path / "a.bin")
    with zipfile.ZipFile(path) as archive:
        first, second = (archive.getinfo(f"a/data/{i}").header_offset for i in (0, 1))
    content = path.read_bytes()
    at = content.index(b"a/data/1", content.index(b"PK\x01\x02")) - 4  # the last field of an entry is its offset
    assert struct.unpack_from("<L", content, at) == (second,)
    path.write_bytes(content[:at] + struct.pack("<L", first) + content[at + 4 :])
    refused(path, "its records lie on each other")


def test_archives_of_more_than_32_bits(tmp_path: Path) -> None:
    """Sparse: the space of the numbers is kept, nothing is written there."""
    path = tmp_path / "large.bin"
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        state = {f"w{i}": torch.empty(9 << 26, dtype=torch.float32) for i in range(2)}  # 2.4 GB each
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, path)
    opened = open_tensor_file(path)
    assert opened.shape("w1") == (9 << 26,)
    assert opened.read("w1")[-1] == 0
    path.unlink()


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (b"cos\nsystem\nX\x02\x00\x00\x00id\x85R", "holds os.system; objects other than tensors .* can run code"),
        (b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R", "holds __builtin__.bytearray"),
        (b"c_codecs\nencode\nX\x01\x00\x00\x00a\x85R", "holds _codecs.encode"),
        (b"ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R", "holds torch.FloatTensor"),
        (b"ctorch\nload\nX\x01\x00\x00\x00a\x85R", "calls torch.load"),
        (b"ccollections\nOrderedDict\n](X\x01\x00\x00\x00aK\x01e\x85R", "pickle is broken"),
        (b"X\x01\x00\x00\x00aQ", "refers to an object outside of the file"),
        (b"(" * 1000 + b"t" * 1000, "holds a tuple, expected a dict"),
        (b"}" + b"\x85" * 100_000 + b"K\x01s", "pickle is broken"),
        (b"}" + b")" + b"\x85" * 100_000 + b"K\x01s", "pickle is broken"),  # as a key, whose hash would recurse
        (b"]" * (MAX_INSTRUCTIONS + 1), "more than 1048576 instructions"),
        (b"N" * MAX_PICKLE_BYTES, "data.pkl has 16777219 bytes, a state dict's at most 16777216"),
    ],
)
def test_pickles_that_would_do_more_than_name_tensors(tmp_path: Path, program: bytes, reason: str) -> None:
    refused(repacked(tmp_path / "a.bin", pickled(program)), reason)


def test_tensors_that_reach_out_of_their_storage(tmp_path: Path) -> None:
    path = save(tmp_path / "a.bin")
    content = path.read_bytes()
    shape = content.index(b"K\x02K\x03\x86q")  # of the first tensor, behind the offset and before the strides
    for at, value in ((shape + 1, 200), (shape + 3, 200), (shape - 1, 200)):
        changed = bytearray(content)
        changed[at] = value
        path.write_bytes(changed)
        refused(path, "has a tensor that reaches over the end of its storage")
    path.write_bytes(content.replace(b"K\x06t", b"K\xf0t", 1))  # more numbers than the record has
    refused(path, "storage 0 has 24 bytes instead of 960")
    old = save(tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    old.write_bytes(old.read_bytes()[:-1])
    refused(old, "is cut off, or its length is not the one announced")


def test_many_tensors_over_the_same_numbers(tmp_path: Path) -> None:
    shared = torch.zeros(100_000)
    assert len(open_tensor_file(save(tmp_path / "two.bin", {"a": shared, "b": shared})).names()) == 2
    refused(save(tmp_path / "many.bin", dict.fromkeys(map(str, range(9)), shared)), "its tensors share their numbers")


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [4, 12])}, "do not lie end to end"),
        ({"a": ("F32", [2], [0, 8]), "b": ("F32", [1], [12, 16])}, "do not lie end to end"),
        ({"a": ("F32", [4], [0, 16]), "b": ("F32", [0], [8, 8])}, "do not lie end to end"),
        ({"a": ("F32", [2], [0, 8])}, "its tensors have 8 bytes, the file 16 for them"),
        ({"a": ("F32", [2.0], [0, 16])}, "the shape or the place of a is none"),
        ({"a": ("F32", [True] * 4, [0, 16])}, "the shape or the place of a is none"),
        ({"a": ("F32", [1 << 62, 4], [0, 16])}, "the shape or the place of a is none"),
        ({"a": ("F32", [4], [0, 16, 16])}, "the shape or the place of a is none"),
        ({"a": ("F32", None, [0, 16])}, "the shape or the place of a is none"),
        ({"a": ("F64", [2], [0, 16])}, "a has dtype F64"),
        ({"a": ({}, [2], [0, 16])}, "a has dtype"),
    ],
)
def test_headers_that_lie(tmp_path: Path, entries: dict[str, Any], reason: str) -> None:
    path = tmp_path / "a.safetensors"
    header = {name: dict(zip(("dtype", "shape", "data_offsets"), entry)) for name, entry in entries.items()}  # noqa: B905
    for content in (header, {**header, "__metadata__": {"format": "pt"}}):
        raw = json.dumps(content).encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(16))
        refused(path, reason)
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{")
    refused(path, "its header is cut off")
    with path.open("r+b") as file:
        file.write((1 << 40).to_bytes(8, "little"))
        file.truncate(1 << 41)  # takes no place on the disk
    refused(path, "its header has 1099511627776 bytes, that of a model at most")
    for raw in (b"[]", b"{}[", b'{"a": 3}', b"{" * 400):
        path.write_bytes(len(raw).to_bytes(8, "little") + raw)
        refused(path, r"a\.safetensors: damaged or not a safetensors file")


def test_nothing_is_allocated_for_what_is_refused(tmp_path: Path) -> None:
    """Under a limit on memory, and without torch, whose own reader would unfold the first of these."""
    bomb = repacked(tmp_path / "bomb.bin", lambda records: records.update({"a/data/0": bytes(400 << 20)}), 8)
    assert bomb.stat().st_size < 1 << 20
    save(tmp_path / "expanded.bin", {"a": torch.zeros(1).expand(1 << 40)})
    repacked(tmp_path / "lists.bin", pickled(b"]" * (8 << 20)))
    save(tmp_path / "deep.bin", pickle.dumps({}))
    (tmp_path / "sparse.bin").write_bytes(b"")
    with (tmp_path / "sparse.bin").open("r+b") as file:
        file.truncate(1 << 42)
    code = """
import resource, sys
from pathlib import Path
sys.modules["torch"] = None
from cpmbee.errors import CheckpointError
from cpmbee.model.tensor_files import open_tensor_file
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (220 << 20), resource.RLIM_INFINITY))
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        open_tensor_file(path)
    except CheckpointError:
        print(path.name)
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.stdout.split() == ["bomb.bin", "deep.bin", "expanded.bin", "lists.bin", "sparse.bin"], run.stderr
