"""Requests of a file or of standard input: JSON Lines, or a JSON object or array over several lines."""

from __future__ import annotations

import io
import math
import os
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from queue import Empty, Queue
from typing import Any, BinaryIO

from cpmbee.errors import PromptError
from cpmbee.json_document import Document, Line, left_open
from cpmbee.json_file import parse_json
from cpmbee.jsonl import numbered_lines


@dataclass(frozen=True)
class Entry:
    """One request of an input, or why there is none.

    Attributes:
        place: where it is, for messages, such as ``"in.jsonl, line 7"``; empty for one of the command line.
        line: number of its first line, from 1; None where that is not known.
        id: its ``"id"``, which comes back with its answer; None without one.
        data: the request; None where there is none.
        error: what is wrong, where ``data`` is None.
    """

    place: str
    line: int | None
    id: str | int | float | None = None
    data: dict[str, Any] | None = None
    error: str = ""

    def located(self, error: str) -> str:
        """A message about this request with its place."""
        return f"{self.place}: {error}" if self.place else error


class RequestFile:
    """An input of requests, opened now and read once.

    Args:
        name: of a file, or ``-`` for standard input.

    Attributes:
        total: how many requests there are, where `count` knew.

    Raises:
        OSError: it cannot be opened.
        PromptError: standard input is closed.
    """

    def __init__(self, name: str) -> None:
        self.total: int | None = None
        self._name = "standard input" if name == "-" else name
        self._file = _standard_input() if name == "-" else open(name, "rb")  # noqa: SIM115 (closed when read)
        self._regular = _is_regular(self._file)

    def __iter__(self) -> Iterator[Entry]:
        """All requests in order, each as soon as its line is there.

        What cannot be read to its end (a line without one, a failing disk) ends in an entry that says so.
        """
        try:
            with self._file:
                yield from self._entries(numbered_lines(self._file, self._name, PromptError))
        except PromptError as error:
            yield Entry("", None, error=str(error))

    def count(self) -> None:
        """Find out how many requests there are, if that costs one look at a file."""
        if not self._regular:
            return
        begin = self._file.tell()
        with suppress(PromptError):  # is said when that line's turn comes
            self.total = sum(1 for _ in numbered_lines(self._file, self._name, PromptError))
        self._file.seek(begin)

    def batches(self, size: int) -> Iterator[list[Entry]]:
        """All requests, several at a time: of a file always ``size``, of a pipe those that are there already."""
        if not self._regular:
            yield from _as_they_come(iter(self), size)
            return
        entries = iter(self)
        while batch := list(islice(entries, size)):
            yield batch

    def _entries(self, lines: Iterator[Line]) -> Iterator[Entry]:
        first = next(lines, None)
        if first is None:
            return
        value, error = _parsed(first[1])
        if isinstance(value, list):
            yield from self._items(first[0], value, num_lines=1)
        elif error and left_open(first[1], may_wait=not self._regular):
            document = Document(first, lines, self._name)
            if document.next is None:
                yield from self._document(document)
            else:  # a line like others, and broken
                lines = chain(document.lines, [document.next], lines)
        else:
            lines = chain([first], lines)
        for number, line in lines:
            value, error = _parsed(line)
            yield self._entry(f"line {number}", number, value, error)

    def _document(self, document: Document) -> Iterator[Entry]:
        number = document.lines[0][0]
        value, error = _parsed(document.text)
        if isinstance(value, list):
            yield from self._items(number, value, len(document.lines))
        else:
            self._correct_total(len(document.lines), 1)
            yield self._entry(f"line {number}", number, value, error)

    def _items(self, number: int, items: list[Any], num_lines: int) -> Iterator[Entry]:
        self._correct_total(num_lines, len(items))
        for i, item in enumerate(items, 1):
            yield self._entry(f"line {number}, item {i}", number, item, "")

    def _entry(self, place: str, number: int, value: Any, error: str) -> Entry:
        place = f"{self._name}, {place}"
        if error or not isinstance(value, dict):
            return Entry(place, number, error=error or "expected a JSON object")
        return make_entry(place, number, value)

    def _correct_total(self, num_lines: int, num_requests: int) -> None:
        if self.total is not None:
            self.total += num_requests - num_lines


def make_entry(place: str, number: int | None, data: dict[str, Any]) -> Entry:
    """An entry of a JSON object: its ``"id"``, a text or a number, is about the request and not part of it."""
    name = data.get("id")
    if isinstance(name, bool) or not isinstance(name, (str, int, float)):
        return Entry(place, number, None, data)  # a dict is content; anything else is refused with its path
    if isinstance(name, float) and not math.isfinite(name):
        return Entry(place, number, error="$.id: must be a text or a finite number")
    del data["id"]
    return Entry(place, number, name, data)


def _parsed(text: bytes) -> tuple[Any, str]:
    """A JSON value and no error, or None and what is wrong."""
    try:
        return parse_json(text, "", PromptError), ""
    except PromptError as error:
        reason = str(error)
        if b"\n" not in text.strip():
            reason = reason.replace(": line 1 column ", ": column ")  # the line's number is said beside it
        return None, reason


def _standard_input() -> BinaryIO:
    if sys.stdin is None:
        raise PromptError("standard input is closed; give a request or a file")
    try:
        # Of its own: a thread that still reads when the interpreter ends must not hold the lock of `sys.stdin`.
        return open(os.dup(sys.stdin.fileno()), "rb")
    except io.UnsupportedOperation:  # replaced by something in memory
        return sys.stdin.buffer


def _is_regular(file: BinaryIO) -> bool:
    """Whether reading never waits."""
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except io.UnsupportedOperation:
        return True


def _as_they_come(entries: Iterator[Entry], size: int) -> Iterator[list[Entry]]:
    """Batches of what there is: waits for the first entry of a batch and for no other."""
    there: Queue[Entry | None] = Queue(size)
    failures: list[BaseException] = []
    stop = threading.Event()

    def read() -> None:
        try:
            for entry in entries:
                there.put(entry)
                if stop.is_set():
                    return
        except BaseException as error:  # is raised where the entries are used
            failures.append(error)
        there.put(None)

    threading.Thread(target=read, name="cpmbee-requests", daemon=True).start()
    try:
        more = True
        while more:
            batch, more = _take(there, size)
            if batch:
                yield batch
        if failures:
            raise failures[0]
    finally:
        stop.set()
        with suppress(Empty):
            there.get_nowait()  # the thread may wait for room


def _take(there: Queue[Entry | None], size: int) -> tuple[list[Entry], bool]:
    """What a queue holds, up to ``size``; waits for the first. Also whether more may come."""
    batch: list[Entry] = []
    with suppress(Empty):
        while len(batch) < size:
            entry = there.get(block=not batch)
            if entry is None:
                return batch, False
            batch.append(entry)
    return batch, True
