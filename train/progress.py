"""What a training command shows: log lines, and a progress bar where standard error is a terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TextIO

from cpmbee.progress import ProgressBar
from cpmbee.train.metrics import StepMetrics
from cpmbee.train.processes import Processes


@contextmanager
def training_progress(stream: TextIO | None = None) -> Iterator[Callable[[StepMetrics, int], None]]:
    """Shows log lines and a bar on the first process; gives what to call after a step, with the number of all.

    Args:
        stream: where to; standard error by default.
    """
    first = Processes.current().first
    package = logging.getLogger("cpmbee")
    level = package.level
    with ProgressBar(stream) as bar:
        handler = _LogLines(bar, stream)
        package.addHandler(handler)
        package.setLevel(logging.INFO if first else logging.ERROR)  # others would only repeat it
        try:
            yield _Steps(bar) if first else _ignore
        finally:
            package.removeHandler(handler)
            package.setLevel(level)


class _Steps:
    """Shows each step, and how long the others will take at the speed of those so far."""

    def __init__(self, bar: ProgressBar) -> None:
        self._bar = bar
        self._first: tuple[int, float] | None = None  # step of this run and when it ended: a resumed run begins late

    def __call__(self, metrics: StepMetrics, steps: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = metrics.step, now
        parts = [f"step {metrics.step} of {steps}", f"loss {metrics.loss:.4f}"]
        step, begin = self._first
        if metrics.step > step:
            left = (now - begin) / (metrics.step - step) * (steps - metrics.step)
            parts.append(f"{timedelta(seconds=round(left))} left")
        parts += [
            f"{metrics.tokens_per_second:,.0f} tokens/s",
            f"padding {metrics.padding:.0%}",
        ]  # cut where it is narrow
        self._bar(", ".join(parts), metrics.step / steps)


class _LogLines(logging.StreamHandler[TextIO]):
    """Log lines that do not run into the bar."""

    def __init__(self, bar: ProgressBar, stream: TextIO | None) -> None:
        super().__init__(stream)
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        self._bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        self._bar.clear()
        super().emit(record)


def _ignore(metrics: StepMetrics, steps: int) -> None:
    """Other processes show no steps."""
