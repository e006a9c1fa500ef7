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

    Attributes:
        active: whether anything is shown.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self.active = self._stream.isatty()
        self._drawn = False
        self._stage = ""
        self._last = 0.0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def __call__(self, stage: str, fraction: float | None, detail: str = "") -> None:
        """Show ``stage`` with ``fraction`` of it done, from 0 to 1, or None where nobody knows; a detail before it."""
        now = time.monotonic()
        done = fraction is not None and fraction >= 1
        if not self.active or (stage == self._stage and not done and now - self._last < _REDRAW_SECONDS):
            return
        self._stage, self._last = stage, now
        line = f"{detail} {stage}" if detail else stage
        if fraction is not None:
            filled = round(max(0.0, min(1.0, fraction)) * _BAR_WIDTH)
            line = f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {fraction:4.0%} {line}"
        self._stream.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
        self._stream.flush()
        self._drawn = True

    def clear(self) -> None:
        """Take the bar away."""
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._drawn = False
