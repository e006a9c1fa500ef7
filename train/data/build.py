"""Building a data set from text or JSON lines, line by line: memory stays flat, whatever the size of the input."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from cpmbee.errors import CpmBeeError, DataError
from cpmbee.json_file import parse_json
from cpmbee.jsonl import all_lines, too_long
from cpmbee.outputs import require_apart
from cpmbee.train.data.markup import check_record, escape_leaves
from cpmbee.train.data.opening import is_dataset, open_dataset
from cpmbee.train.data.records import MAX_RECORD_BYTES, RecordSet, count_characters, parse_record
from cpmbee.train.data.text import clean_text, split_text
from cpmbee.train.data.writer import DEFAULT_SHARD_BYTES, new_dataset, to_payload

logger = logging.getLogger("cpmbee.train.data")

Format = Literal["text", "jsonl"]
Payload = tuple[bytes, int]  # a record as JSON, and its characters of text
STDIN = Path("-")
TEXT_FIELD = "text"  # the one field of a record that was plain text
_PROGRESS_EVERY = 1 << 22  # bytes read between two reports


@dataclass(frozen=True)
class TextOptions:
    """What becomes of plain text.

    Attributes:
        clean: remove control characters, runs of blanks and the like (`cpmbee.train.data.text.clean_text`).
        min_length: shorter pieces are left out and counted, in characters.
        max_length: texts are cut at line breaks into pieces of at most so many characters; None keeps them whole.
    """

    clean: bool = True
    min_length: int = 1
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.min_length < 1:
            raise DataError(f"min_length must be at least 1, not {self.min_length}")
        if self.max_length is not None and self.max_length < self.min_length:
            raise DataError(f"max_length {self.max_length} is less than min_length {self.min_length}")


@dataclass(frozen=True)
class BuildReport:
    """What a build read and wrote.

    Attributes:
        records: written.
        characters: of text in them.
        lines: read; of a data set, records.
        bytes_read: of the input.
        too_short: pieces of text left out for `TextOptions.min_length`.
        bad_lines: left out because they could not be read.
        first_bad: number of the first of them and the reason.
        shards: files written.
    """

    records: int
    characters: int
    lines: int
    bytes_read: int
    too_short: int
    bad_lines: int
    first_bad: str | None
    shards: int


@dataclass
class _Counts:
    lines: int = 0
    bytes_read: int = 0
    too_short: int = 0
    bad_lines: int = 0
    first_bad: str | None = None


def build_dataset(
    source: Path,
    out: Path,
    file_format: Format | None = None,
    *,
    text: TextOptions | None = None,
    escape: bool = False,
    skip_bad: bool = False,
    overwrite: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[str, float], None] | None = None,
) -> BuildReport:
    r"""Build a data set; interrupted, it leaves nothing half-written.

    Args:
        source: a file of one text a line, in which ``\n`` stands for a line break; or of one JSON object a line, a
            nested dict of strings; or a data set, such as one that the original tools wrote; ``-`` is standard input.
        out: folder to write; absent or empty, unless ``overwrite``.
        file_format: of a file; None tells by its name (``.jsonl`` and ``.json``, else text).
        text: what becomes of plain text; a record of it is ``{"text": piece}``, its ``<`` doubled.
        escape: every ``<`` in a value of JSON is literal.
        skip_bad: leave out and count lines that cannot be read.
        overwrite: replace a data set that is there.
        shard_bytes: about how large a file becomes.
        progress: called with a stage and the share of it that is done.

    Raises:
        DataError: ``source`` or a line of it cannot be read (names its number and the reason), no record is left, or
            ``out`` cannot be written.
    """
    if source != STDIN:
        require_apart([out], [source], DataError)
    options = text or TextOptions()
    counts = _Counts()
    with ExitStack() as stack:
        if source != STDIN and is_dataset(source):
            kind = "dataset"
            records = _old_records(open_dataset(source), counts, escape, skip_bad)
        else:
            kind = file_format or ("jsonl" if source.suffix in (".jsonl", ".json") else "text")
            file = stack.enter_context(_opened(source))
            lines = _lines(file, source, counts, skip_bad, progress)
            if kind == "text":
                records = _pieces(lines, source, options, counts, skip_bad)
            else:
                records = _parsed(lines, source, counts, escape, skip_bad)
        writer = stack.enter_context(new_dataset(out, overwrite, shard_bytes))
        for payload, length in records:
            writer.write_payload(payload, length)
        if not writer.records:
            raise DataError(f"{source}: has no record to build from ({counts.lines} lines{_left_out(counts)})")
        manifest = writer.finish(
            {
                "name": source.name,
                "format": kind,
                **(asdict(options) if kind == "text" else {"escape": escape}),
                **asdict(counts),
            }
        )
    if counts.bad_lines:
        logger.warning("%s: left out %d lines; the first was %s", source, counts.bad_lines, counts.first_bad)
    return BuildReport(
        records=manifest.records, characters=manifest.characters, shards=len(manifest.shards), **asdict(counts)
    )


def _left_out(counts: _Counts) -> str:
    found = {"bad": counts.bad_lines, "texts too short": counts.too_short}
    return "".join(f", {count} {what}" for what, count in found.items() if count)


@contextmanager
def _opened(source: Path) -> Iterator[BinaryIO]:
    if source == STDIN:
        if sys.stdin is None:
            raise DataError("standard input is closed; name a file")
        yield sys.stdin.buffer
        return
    try:
        file = source.open("rb")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no file can have this name"
        raise DataError(f"{source}: cannot be read ({reason})") from None
    with file:
        yield file


def _lines(
    file: BinaryIO,
    source: Path,
    counts: _Counts,
    skip_bad: bool,
    progress: Callable[[str, float], None] | None,
) -> Iterator[bytes]:
    """Lines that are not empty, counted."""
    size = 0 if source == STDIN else max(1, source.stat().st_size)
    reported = 0
    for number, content, read in all_lines(file, str(source), DataError, MAX_RECORD_BYTES):
        counts.lines = number
        counts.bytes_read += read
        if progress and size and counts.bytes_read - reported >= _PROGRESS_EVERY:
            reported = counts.bytes_read
            progress("building", reported / size)
        if content is None:
            _bad(counts, source, too_long(MAX_RECORD_BYTES), skip_bad)
        elif not content.isspace():
            yield content


def _pieces(
    lines: Iterable[bytes], source: Path, options: TextOptions, counts: _Counts, skip_bad: bool
) -> Iterator[Payload]:
    longest = sys.maxsize if options.max_length is None else options.max_length
    encode = json.encoder.JSONEncoder(ensure_ascii=False).encode
    for content in lines:
        try:
            line = content.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            _bad(counts, source, f"not UTF-8 ({error.reason} at byte {error.start})", skip_bad)
            continue
        if line.isspace():
            continue
        text = line.replace("\\n", "\n") if "\\" in line else line
        if options.clean:
            text = clean_text(text)
        for piece in split_text(text, longest):
            if options.clean:
                piece = piece.strip()  # what was cut at is no part of a piece
            if len(piece) < options.min_length or piece.isspace():
                counts.too_short += 1
                continue
            escaped = piece.replace("<", "<<")
            yield f'{{"{TEXT_FIELD}":{encode(escaped)}}}'.encode(), len(escaped)


def _parsed(lines: Iterable[bytes], source: Path, counts: _Counts, escape: bool, skip_bad: bool) -> Iterator[Payload]:
    for content in lines:
        try:
            yield _checked(parse_json(content, "", DataError), escape)
        except CpmBeeError as error:
            _bad(counts, source, str(error), skip_bad)


def _old_records(old: RecordSet, counts: _Counts, escape: bool, skip_bad: bool) -> Iterator[Payload]:
    for index in range(len(old)):
        counts.lines += 1
        where = f"{old.name}, record {index}"
        try:
            payload = old.payload(index)
            counts.bytes_read += len(payload)
            yield _checked(parse_record(payload, where), escape)
        except CpmBeeError as error:
            _bad(counts, Path(old.name), str(error).removeprefix(f"{where}: "), skip_bad, "record", index)


def _checked(record: Any, escape: bool) -> Payload:
    """Payload and characters of a record.

    Raises:
        CpmBeeError: it is not a nested dict of strings in CPM-Bee's markup.
    """
    if escape and isinstance(record, dict):
        record = escape_leaves(record)
    check_record(record)
    return to_payload(record), count_characters(record)


def _bad(counts: _Counts, source: Path, reason: str, skip: bool, unit: str = "line", number: int | None = None) -> None:
    where = f"{source}, {unit} {counts.lines if number is None else number}"
    message = f"{where}: {reason}"
    if not skip:
        raise DataError(f"{message} (--skip-bad leaves out and counts such {unit}s)")
    counts.bad_lines += 1
    counts.first_bad = counts.first_bad or message.removeprefix(f"{source}, ")
