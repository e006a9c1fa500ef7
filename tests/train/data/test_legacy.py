"""Data sets of the original tools: JSON and plain pickles are read; code in pickles never runs."""

import json
import os
import pickle
import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from cpmbee.errors import DataError
from cpmbee.train.data import Dataset, build_dataset, open_dataset
from cpmbee.train.data.legacy import LegacyDataset
from cpmbee.train.data.plain_pickle import load_plain
from tests.train.data.cases import BLOCK, PAYLOADS, RECORDS, pickled, write_legacy

plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)),
    max_leaves=20,
)


def test_json_records_are_read_over_blocks_and_files(tmp_path: Path) -> None:
    folder = write_legacy(tmp_path / "old", [PAYLOADS[:25], PAYLOADS[25:]])
    dataset = open_dataset(folder)
    assert isinstance(dataset, LegacyDataset)
    assert list(dataset) == RECORDS
    assert dataset[39] == RECORDS[39]
    assert dataset[0] == RECORDS[0]
    dataset.verify()
    with pytest.raises(IndexError):
        dataset[40]


def test_masked_files_are_left_out(tmp_path: Path) -> None:
    assert len(open_dataset(write_legacy(tmp_path / "old", [PAYLOADS], mask=True))) == 0


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_pickles_are_read(tmp_path: Path, protocol: int) -> None:
    payloads = [pickled(record, protocol) for record in RECORDS]
    assert list(open_dataset(write_legacy(tmp_path / "old", [payloads]))) == RECORDS


@given(plain, st.integers(2, 5))
def test_plain_data_survives(value: Any, protocol: int) -> None:
    assert load_plain(pickle.dumps(value, protocol)) == value


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    "value", [Evil(), OrderedDict(a="b"), {"a": {1, 2}}, {"a": b"bytes"}, {"a": 1j}, {"a": ("b",)}]
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_anything_else_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset = open_dataset(write_legacy(tmp_path / "old", [[PAYLOADS[0], pickled(value, protocol)]]))
    with pytest.raises(DataError, match=r"old, record 1: pickle does more than plain data needs \([A-Z]"):
        dataset[1]
    assert not (tmp_path / "evil").exists()
    assert dataset[0] == RECORDS[0]


def test_a_pickle_that_repeats_a_long_text_is_refused() -> None:
    text = "x" * (1 << 20)
    assert load_plain(pickle.dumps([text] * 3)) == [text] * 3
    with pytest.raises(DataError, match="pickle repeats texts to more than"):
        load_plain(pickle.dumps([text] * 100))


@pytest.mark.parametrize("bad", [pickled({"a": {1, 2}}), b"nonsense"])
def test_records_that_cannot_be_read_are_named_once_or_left_out(tmp_path: Path, bad: bytes) -> None:
    old = write_legacy(tmp_path / "old", [[PAYLOADS[0], bad, PAYLOADS[1]]])
    with pytest.raises(DataError, match=r"old, record 1: (pickle does more|not JSON)[^,]*"):
        build_dataset(old, tmp_path / "new")
    report = build_dataset(old, tmp_path / "new", skip_bad=True)
    assert (report.records, report.bad_lines) == (2, 1)
    assert report.first_bad is not None
    assert report.first_bad.count("record 1") == 1


def test_a_pickle_that_unfolds_is_refused() -> None:
    value: Any = ["x"]
    for _ in range(40):
        value = [value, value]
    with pytest.raises(DataError, match="uses one list or dict twice"):
        load_plain(pickle.dumps(value))


@given(st.binary(max_size=60), plain, st.data())
def test_broken_pickles_give_clear_errors(noise: bytes, value: Any, data: st.DataObject) -> None:
    payload = bytearray(pickle.dumps(value, 4))
    for _ in range(3):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    codes = "".join(op.code for op in pickletools.opcodes).encode("latin-1")
    for broken in (bytes(payload), bytes(payload[: len(payload) // 2]), b"\x80\x04" + noise, b"\x80\x04" + codes):
        try:
            load_plain(broken)
        except DataError:
            continue


@pytest.mark.parametrize("payload", [b"[1]", b"\xff", b"", b"(dp0\n.", pickled(["a"])])
def test_records_that_are_no_dicts_are_named(tmp_path: Path, payload: bytes) -> None:
    dataset = open_dataset(write_legacy(tmp_path / "old", [[payload]]))
    with pytest.raises(DataError, match="old, record 0: "):
        dataset[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nlines": 3}, r"data_0\.bin: .*it has 40 records, meta\.bin says 3"),
        ({"block_end": 1}, r"data_0\.bin: .*bytes, meta\.bin says 1 x 256"),
        ({"block_size": 0}, r"meta\.bin, line 1: sizes"),
        ({"file_name": "../data"}, r"meta\.bin, line 1: '\.\./data' lies outside"),
        ({"file_name": "absent"}, "absent: cannot read a file of the data set .No such file"),
        ({"file_name": 3}, r"meta\.bin, line 1: is not an object with the name"),
    ],
)
def test_a_bad_meta_is_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(write_legacy(tmp_path / "old", [PAYLOADS], **fields))


def test_meta_that_is_no_json(tmp_path: Path) -> None:
    folder = write_legacy(tmp_path / "old", [PAYLOADS])
    (folder / "meta.bin").write_text("\n{")
    with pytest.raises(DataError, match=r"meta\.bin, line 2: not JSON"):
        open_dataset(folder)
    (folder / "meta.bin").write_text('{"file_name": "data_0.bin"}')
    with pytest.raises(DataError, match=r"meta\.bin, line 1: has no field 'block_begin'"):
        open_dataset(folder)


@pytest.mark.parametrize("name", ["meta.bin", "data_0.bin"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = write_legacy(tmp_path / "old", [PAYLOADS])
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(DataError, match=rf"{name}: cannot read .*it is a pipe or a device"):
        open_dataset(folder)


def test_a_byte_order_mark_and_a_huge_line_of_meta(tmp_path: Path) -> None:
    folder = write_legacy(tmp_path / "old", [PAYLOADS])
    meta = (folder / "meta.bin").read_bytes()
    (folder / "meta.bin").write_bytes(b"\xef\xbb\xbf" + meta)
    assert len(open_dataset(folder)) == len(PAYLOADS)
    with (folder / "meta.bin").open("ab") as file:
        file.truncate(1 << 40)  # a line of zeros, which take no place on the disk
    with pytest.raises(DataError, match=r"meta\.bin, line 2: longer than"):
        open_dataset(folder)


def test_a_file_of_zeros_is_not_walked_through(tmp_path: Path) -> None:
    """A hole of a terabyte takes no place on the disk, and no time here."""
    folder = write_legacy(tmp_path / "old", [PAYLOADS], block_end=1 << 40, block_size=1)
    with (folder / "data_0.bin").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"data_0\.bin: the file is damaged: block 0 has no record"):
        open_dataset(folder)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"meta\.bin, line 1: |cannot read a file of the data set"):
        open_dataset(write_legacy(tmp_path / "old", [PAYLOADS], file_name=name))


@pytest.mark.parametrize(
    ("offset", "byte", "message"), [(0, 7, "no record begins at byte 0"), (3, 255, "a record at byte 0 reaches over")]
)
def test_damaged_files_are_named(tmp_path: Path, offset: int, byte: int, message: str) -> None:
    folder = write_legacy(tmp_path / "old", [PAYLOADS])
    content = bytearray((folder / "data_0.bin").read_bytes())
    content[offset] = byte
    (folder / "data_0.bin").write_bytes(content)
    with pytest.raises(DataError, match=rf"data_0\.bin: the file is damaged: {message}"):
        open_dataset(folder)


def test_records_may_fill_a_block_to_its_end(tmp_path: Path) -> None:
    payload = json.dumps({"a": "x" * (BLOCK - 15)}).encode()
    assert len(payload) == BLOCK - 6
    assert len(list(open_dataset(write_legacy(tmp_path / "old", [[payload, payload]])))) == 2


def test_old_data_sets_are_converted(tmp_path: Path) -> None:
    old = write_legacy(tmp_path / "old", [[*map(pickled, RECORDS), pickled({"a": 1})]], block=1024)
    with pytest.raises(DataError, match=r"old, record 40: \$\.a: expected a string"):
        build_dataset(old, tmp_path / "new")
    report = build_dataset(old, tmp_path / "new", skip_bad=True)
    assert (report.records, report.bad_lines) == (40, 1)
    assert list(Dataset(tmp_path / "new")) == RECORDS
