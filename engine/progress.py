"""A progress bar on the terminal, for commands that take long; the library itself only calls it."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

_REDRAW_SECONDS = 0.1
_BAR_WIDTH = 30


class ProgressBar:
    """Shows what is being done and how much of it is done; silent where standard error is not a terminal.

    Args:
        stream: where to draw; standard error by default.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._active = self._stream.isatty()
        self._drawn = False
        self._stage = ""
        self._last = 0.0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def __call__(self, stage: str, fraction: float) -> None:
        """Show ``stage`` with ``fraction`` of it done, from 0 to 1."""
        now = time.monotonic()
        if not self._active or (stage == self._stage and fraction < 1 and now - self._last < _REDRAW_SECONDS):
            return
        self._stage, self._last = stage, now
        filled = round(max(0.0, min(1.0, fraction)) * _BAR_WIDTH)
        line = f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {fraction:4.0%} {stage}"
        self._stream.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
        self._stream.flush()
        self._drawn = True

    def clear(self) -> None:
        """Take the bar away."""
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._drawn = False
