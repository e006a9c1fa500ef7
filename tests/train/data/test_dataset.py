"""Data sets: what was written is read, by number, in shards; what is damaged is named."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from cpmbee.errors import DataError
from cpmbee.train.data import Dataset, open_dataset
from cpmbee.train.data.records import count_characters
from cpmbee.train.data.writer import BATCH_BYTES, new_dataset
from tests.train.data.cases import write_dataset

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
records = st.recursive(
    st.dictionaries(text, text, max_size=3), lambda inner: st.dictionaries(text, st.one_of(text, inner), max_size=3)
)
TWO = [{"text": "今天"}, {"text": "天气", "more": {"a": "b"}}]


def read_error(folder: Path) -> str | None:
    """What reading everything complains about; None where the records are the two of the test below."""
    try:
        assert list(Dataset(folder)) == TWO
    except DataError as error:
        return str(error)
    return None  # the bit was padding, or what readers ignore


def damage(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1
    file.write_bytes(content)


@given(written=st.lists(records, min_size=1, max_size=12), shard_bytes=st.integers(1, 200), world=st.integers(1, 5))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(
    written: list[Any], shard_bytes: int, world: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = write_dataset(tmp_path_factory.mktemp("set") / "data", written, shard_bytes)
    dataset = Dataset(folder)
    assert len(dataset) == len(written)
    assert list(dataset) == written
    assert [dataset[i] for i in reversed(range(len(written)))] == written[::-1]
    assert dataset[-1] == written[-1]
    assert dataset[1:] == written[1:]
    assert dataset.lengths().tolist() == list(map(count_characters, written))
    dataset.verify()
    shards = [dataset.shard(rank, world) for rank in range(world)]
    assert [record for shard in shards for record in shard] == written
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert np.concatenate([shard.lengths() for shard in shards]).tolist() == dataset.lengths().tolist()


def test_large_data_set_has_many_batches_and_shards(tmp_path: Path) -> None:
    written = [{"text": f"{i:06d}" + "x" * 3000} for i in range(400)]
    dataset = Dataset(write_dataset(tmp_path / "data", written, shard_bytes=2 * BATCH_BYTES))
    assert len(dataset.manifest.shards) == 3
    assert [dataset[i] for i in (0, 399, 200, 87, 88)] == [written[i] for i in (0, 399, 200, 87, 88)]


@pytest.mark.parametrize("index", [2, -3])
def test_numbers_outside_are_refused(tmp_path: Path, index: int) -> None:
    dataset = Dataset(write_dataset(tmp_path / "data", [{"a": "1"}, {"a": "2"}]))
    with pytest.raises(IndexError):
        dataset[index]
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        dataset.shard(2, 2)


def test_a_flipped_bit_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", [{"text": "x" * 1000}] * 3)
    file = folder / "shard-00000.arrow"
    damage(file, file.read_bytes().index(b"xxx") + 500)
    dataset = Dataset(folder)  # its size is right
    with pytest.raises(DataError, match=r"shard-00000\.arrow: the shard is damaged: record batch 0 does not match"):
        dataset[2]
    with pytest.raises(DataError, match=r"shard-00000\.arrow: the shard is damaged: its checksum"):
        dataset.verify()


def test_flipped_bits_give_clear_errors_or_make_no_difference(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", TWO)
    file = folder / "shard-00000.arrow"
    whole = file.read_bytes()
    for offset in range(0, len(whole), 5):
        damage(file, offset)
        message = read_error(folder)
        assert message is None or "shard-00000.arrow" in message
        with pytest.raises(DataError, match="shard-00000"):
            Dataset(folder).verify()
        file.write_bytes(whole)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_shard_that_is_cut_off_is_named(tmp_path: Path, cut: int) -> None:
    folder = write_dataset(tmp_path / "data", [{"text": "x" * 100}])
    file = folder / "shard-00000.arrow"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"shard-00000\.arrow: the shard is damaged: it has \d+ bytes, the"):
        Dataset(folder)


def test_a_shard_that_git_lfs_has_not_fetched_is_called_that(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", [{"text": "x"}])
    (folder / "shard-00000.arrow").write_text("version https://git-lfs.github.com/spec/v1\nsize 3\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"shard-00000\.arrow: a git-lfs pointer, not a shard; .*git lfs pull"):
        Dataset(folder)


def test_an_absent_shard_is_named(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", [{"text": "x"}])
    (folder / "shard-00000.arrow").unlink()
    with pytest.raises(DataError, match=r"shard-00000\.arrow: cannot be opened"):
        Dataset(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema version 2"),
        ({"format": "other"}, "not the manifest of a data set"),
        ({"records": 5}, "counts 5 records, its shards 1"),
        ({"shards": 1}, "no list of shards"),
        ({"shards": [{"file": "x"}]}, "shard 0 does not have the fields"),
        *(
            ({"shards": [{"file": name, "records": 1, "characters": 1, "size": 1, "sha256": ""}]}, "outside")
            for name in ("../x", "..", "", "a/b", "c:x", "a\0b", "\ud800", "天" * 100)
        ),
        ({"shards": [{"file": "x", "records": -1, "characters": 1, "size": 1, "sha256": ""}]}, "bad records: -1"),
        ({"shards": [{"file": "x", "records": 10**30, "characters": 1, "size": 1, "sha256": ""}]}, "bad records: 1000"),
    ],
)
def test_a_bad_manifest_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = write_dataset(tmp_path / "data", [{"text": "x"}])
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(DataError, match=rf"manifest\.json: .*{message}"):
        Dataset(folder)


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_compressed_shards_are_refused_before_they_unfold(tmp_path: Path, compression: str) -> None:
    """Under a limit on memory that the file itself is far from reaching."""
    code = """
import resource, sys
from pathlib import Path
import pyarrow as pa
from cpmbee.errors import DataError
from cpmbee.train.data import open_dataset
from cpmbee.train.data.manifest import Manifest, ShardEntry
from cpmbee.train.data.shard_file import SCHEMA
folder, compression = Path(sys.argv[1]), sys.argv[2]
file = folder / "shard.arrow"
batch = pa.record_batch([pa.array([bytes(256 << 20)], pa.binary()), pa.array([1], pa.int64())], schema=SCHEMA)
with pa.ipc.new_file(str(file), SCHEMA, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
    writer.write_batch(batch)
del batch
size = file.stat().st_size
assert size < 4 << 20
Manifest((ShardEntry("shard.arrow", 1, 1, size, "0" * 64),)).write(folder)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
try:
    open_dataset(folder)[0]
except DataError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path), compression]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert "the shard is damaged: its records are compressed" in run.stdout, run.stderr


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.arrow"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = write_dataset(tmp_path / "data", [{"text": "x"}])
    (folder / name).unlink()
    os.mkfifo(folder / name)
    if name != "manifest.json":  # whose size the manifest may name
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["shards"][0]["size"] = 0
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"{name}: cannot read .*it is a pipe or a device"):
        open_dataset(folder)[0]


def test_a_shard_of_no_bytes_is_damaged(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", [{"text": "x"}])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["size"] = 0
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "shard-00000.arrow").write_bytes(b"")
    with pytest.raises(DataError, match="shard is damaged: cannot mmap an empty file"):
        open_dataset(folder)[0]


def test_what_is_no_data_set_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a data set"):
        open_dataset(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(tmp_path / ("x" * 5000))
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(tmp_path / "absent")


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with new_dataset(tmp_path / "data", overwrite=False) as writer:
            writer.write({"text": "x" * BATCH_BYTES})
            assert list(tmp_path.glob(".data.writing-*/shard-00000.arrow"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_only_data_sets_are_overwritten(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", [{"text": "old"}])
    with pytest.raises(DataError, match="already exists"):
        write_dataset(folder, [{"text": "new"}])
    with new_dataset(folder, overwrite=True) as writer:
        writer.write({"text": "new"})
        writer.finish({})
    assert list(Dataset(folder)) == [{"text": "new"}]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"notes\.txt"), new_dataset(folder, overwrite=True):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"), new_dataset(tmp_path / "file", overwrite=True):
        pass
