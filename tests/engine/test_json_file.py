"""JSON that may hold anything: read as the standard library reads it, within limits that are checked before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpmbee import json_file
from cpmbee.errors import ConfigError
from cpmbee.json_file import MAX_DEPTH, parse_json, read_json_object

TEXT = st.text(st.sampled_from('a"\\[]{},: \n天')) | st.text()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=30,
)


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


def count_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(count_of, inner))


@given(value=VALUES, ascii_only=st.booleans(), mark=st.sampled_from([b"", b"\xef\xbb\xbf"]))
def test_depth_and_number_of_values_are_known_before_parsing(value: Any, ascii_only: bool, mark: bytes) -> None:
    content = mark + json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    depth, values = json_file._extent(content.removeprefix(mark))
    assert depth == depth_of(value)
    assert count_of(value) - depth_of(value) <= 2 * values + 1
    assert values <= 2 * count_of(value)
    if not any("\ud800" <= char <= "\udfff" for char in str(value)):
        assert parse_json(content, "here", ConfigError) == value


def test_limits() -> None:
    deep = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    assert depth_of(parse_json(deep, "here", ConfigError)) == MAX_DEPTH
    many = b"[" + b"1," * json_file.MAX_VALUES + b"1]"
    for content, reason in (
        (b"[" + deep + b" " * 1024 + b"]", "nested deeper than 256"),
        (b"{" * 100_000, "nested deeper than 256"),
        (many, "more than 1048576 values"),
        (many.replace(b"1,", b"{},"), "more than 1048576 values"),
        (b"[" + b"9" * 5000 + b"]", "digits"),
        (b"\xff", "not UTF-8: invalid start byte at byte 0"),
        (b"", "not JSON"),
    ):
        with pytest.raises(ConfigError, match=f"^here: not JSON.*{reason}|^here: {reason}"):
            parse_json(content, "here", ConfigError)
    text = json.dumps({"code": '{"[,' * 400_000})  # within a string nothing counts
    assert parse_json(text.encode(), "here", ConfigError) == json.loads(text)


def test_objects_only(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json_object(file, "a test", ConfigError) == {"a": 1}
    file.write_bytes(b'{"a": ' + b"[" * 256 + b"]" * 256 + b"}")  # short, and yet too deep to be shown in a message
    with pytest.raises(ConfigError, match=r"file\.json: not JSON that can be read \(nested deeper than 256\)"):
        read_json_object(file, "a test", ConfigError)
    file.write_bytes(b"[1]")
    with pytest.raises(ConfigError, match=r"file\.json: expected a JSON object"):
        read_json_object(file, "a test", ConfigError)
