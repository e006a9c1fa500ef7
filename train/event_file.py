"""TensorBoard's event files, written at once and by the caller: a full disk is the caller's error, not a thread's."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class EventFile:
    """A file of scalars.

    Args:
        folder: where it shall be, beside those of the run's other parts.
        first_step: what others say about this step and later ones no longer holds.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._new_event, self._new_summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb")
        self._writer = RecordWriter(self._file)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=start)
        self._file.flush()

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record scalars of a step, and hand them to the operating system."""
        values = [self._new_summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(step=step, summary=self._new_summary(value=values))
        self._file.flush()

    def close(self) -> None:
        """Nothing can be recorded any more."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        self._writer.write(self._new_event(wall_time=time.time(), **fields).SerializeToString())
